"""What the command line shows: rich tables made from plain records."""

from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from slimlm.evaluate.results import Record


def size(bytes_: float) -> str:
    """A size for people: 1.23 MB (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 1000 or unit == "GB":
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.2f} {unit}"
        bytes_ /= 1000
    raise AssertionError


def plain_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """A table whose first `left` columns are text and the rest figures."""
    table = Table(
        title=None if title is None else escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def layers_table(record: Record) -> Table:
    """A row per layer."""
    rows = (
        (
            r.name,
            f"{r.shape[0]} x {r.shape[1]}",
            r.parts,
            f"{r.bits_per_weight:.3f}",
            f"{r.sparsity:.1%}",
            str(r.rank),
            f"{r.error:.4f}",
        )
        for r in record.layers
    )
    columns = ("layer", "out x in", "parts", "bits/weight", "sparsity", "rank", "error")
    return plain_table(None, columns, rows, left=3)


def summary_table(record: Record) -> Table:
    """The totals of a compression."""
    errors = sorted(r.error for r in record.layers)
    worst = max(record.layers, key=lambda r: r.error)
    calibration = record.calibration
    asked = calibration.get("asked", calibration["samples"])
    fewer = "" if asked == calibration["samples"] else f" (asked for {asked}; the text gives no more)"
    names = list(record.left)
    left = "".join(f", {name}" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    named = ": ".join(text for text in (record.recipe["name"], record.recipe["summary"]) if text)
    rows = [
        ("recipe", named),
        ("calibration", f"{calibration['data']}, {calibration['samples']} windows of {calibration['length']} tokens{fewer}"),
        (
            "size",
            f"{size(record.original_bytes)} -> {size(record.stored_bytes)}"
            f" ({record.stored_bytes / record.original_bytes:.1%} of the original)",
        ),
        ("bits per weight", f"{record.bits_per_weight:.3f} in the {len(record.layers)} compressed layers, everything counted"),
        ("relative output error", f"median {errors[len(errors) // 2]:.4f}, largest {worst.error:.4f} ({worst.name})"),
        ("coverage", f"{record.coverage:.1%} of the weights in the blocks; as they were: embeddings, norms{left}"),
        ("time", f"{record.seconds:.1f} s" + (f", peak memory {size(record.peak_memory)}" if record.peak_memory else "")),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
