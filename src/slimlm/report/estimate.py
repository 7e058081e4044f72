"""The table of `slimlm plan`: the estimate of a run."""

from collections import Counter

from rich.table import Table

from slimlm.display import duration
from slimlm.preflight.estimate import Estimate, Memory
from slimlm.report.tables import pairs_table
from slimlm.runtime.memory import format_bytes

_NAMED = 6


def estimate_table(found: Estimate) -> Table:
    """A row each for layers, bits, sizes, tokens, memory, disk and time."""
    weights = sum(out * width for out, width in found.layers.values())
    planned = ", the budget: how each layer is stored is not planned yet" if found.planned else ", everything counted"
    rows = [
        ("recipe", f"{found.recipe}: {found.summary}"),
        ("layers", f"{len(found.layers)} in {found.blocks} blocks, {weights / 1e6:.1f} million weights ({_shapes(found)})"),
        *[("not compressed" if i == 0 else "", text) for i, text in enumerate(_skipped(found.skipped))],
        ("bits per weight", f"{found.bits_per_weight:.3f}{planned}"),
        ("size", f"{format_bytes(found.original_bytes)} -> {format_bytes(found.stored_bytes)} ({_share(found)})"),
        ("calibration", _tokens(found)),
        ("memory", _memory(found.memory)),
        ("disk", f"{format_bytes(found.disk)} at most, for the output and the journal{_free(found.disk_free)}"),
        *_times(found),
    ]
    return pairs_table(rows)


def _shapes(found: Estimate) -> str:
    counted = Counter(found.layers.values()).most_common()
    named = [f"{count} of {out} x {width}" for (out, width), count in counted[:_NAMED]]
    return ", ".join(named) + (" and others" if len(counted) > _NAMED else "")


def _skipped(skipped: dict[str, str]) -> list[str]:
    """The layers that are not compressed, grouped by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}: {reason}"
        for reason, names in reasons.items()
    ]


def _share(found: Estimate) -> str:
    return f"{found.stored_bytes / found.original_bytes:.1%} of the original"


def _tokens(found: Estimate) -> str:
    given = f"{found.tokens} tokens in {found.samples} samples, if the text has that many"
    seconds = found.seconds_per_sample
    more = "" if seconds is None else f"; each further sample takes {_more(seconds)} more"
    if found.tokens_needed is None:
        return f"{given}; the recipe needs no covariance{more}"
    name, (_, width) = max(found.layers.items(), key=lambda layer: layer[1][1])
    enough = "enough" if found.tokens >= found.tokens_needed else "too few: give more calibration samples"
    per_input = f"{found.tokens / width:.3g} for each of the {width} inputs of the widest layer ({name})"
    return f"{given}: {per_input}, whose covariance needs {found.tokens_needed}: {enough}{more}"


def _more(seconds: float) -> str:
    if seconds < 0.05:
        return "less than 0.1 s"
    return f"about {seconds:.1f} s" if seconds < 10 else f"about {duration(seconds)}"


def _memory(memory: Memory) -> str:
    where = "kept on the disk" if memory.on_disk else "kept in memory"
    there = (
        ""
        if memory.free is None or memory.total is None
        else f"; {format_bytes(memory.free)} of {format_bytes(memory.total)} free"
    )
    return (
        f"about {format_bytes(memory.peak)} at most (the program {format_bytes(memory.process)}, the current block "
        f"{format_bytes(memory.block)}, activations {format_bytes(memory.activations)}, {where}){there}"
    )


def _free(free: int | None) -> str:
    return "" if free is None else f"; {format_bytes(free)} free"


def _times(found: Estimate) -> list[tuple[str, str]]:
    if found.seconds is None or found.total_seconds is None:
        return []
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in found.seconds.items() if seconds >= 0.5)
    return [
        (
            "time",
            f"about {duration(found.total_seconds)} at rates measured on this machine" + (f" ({parts})" if parts else ""),
        )
    ]
