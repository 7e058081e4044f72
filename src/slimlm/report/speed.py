"""Tables and a plot of what `slimlm bench` measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from slimlm.report.tables import plain_table

Row = dict[str, Any]
_COLOURS = {"slimlm": "tab:red", "torch float32": "black", "torch bfloat16": "0.6"}


def layer_speed_table(result: dict[str, Any]) -> Table:
    """A row per layer shape, batch and implementation: time of a product, speed relative to float32, bytes read, bandwidth."""
    rows, before = [], None
    for row in result["layers"]:
        kind = (row["shape"], row["parts"])
        first = (f"{row['shape'][0]} x {row['shape'][1]}", str(row["layers"]), row["parts"]) if kind != before else ("", "", "")
        before = kind
        contender = f"slimlm ({row['kernels']})" if row["contender"] == "slimlm" else row["contender"]
        figures = (
            f"{row['seconds'] * 1e6:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes_moved'] / 1e6:.2f}",
            f"{row['bytes_per_second'] / 1e9:.1f}",
            f"{row['of_bandwidth']:.0%}",
        )
        rows.append((*first, contender, str(row["batch"]), *figures))
    columns = ("out x in", "layers", "parts", "implementation", "batch", "us", "x float32", "MB", "GB/s", "of bandwidth")
    clock = f"1 thread, {result['clock']}"
    if result["threads"] > 1:
        clock = f"{result['threads']} threads ({result['machine']['waiting_threads']}), {result['clock']}"
    title = f"time of one product; {clock}; read bandwidth {result['read_bandwidth'] / 1e9:.1f} GB/s"
    return plain_table(title, columns, rows, left=4)


def generation_speed_table(result: dict[str, Any]) -> Table:
    """A row per model and batch: tokens per second, that relative to float32, and the bound that reading the weights sets."""
    dense = {row["batch"]: row["new_tokens_per_second"] for row in result["generation"] if row["contender"] == "torch float32"}
    rows = [
        (
            row["contender"],
            str(row["batch"]),
            f"{row['prompt_tokens_per_second']:.1f}",
            f"{row['new_tokens_per_second']:.1f}",
            f"{row['new_tokens_per_second'] / dense[row['batch']]:.2f}" if row["batch"] in dense else "-",
            f"{row['new_tokens_per_second_bound']:.1f}",
            f"{row['bytes_per_step'] / 1e6:.1f}",
            row["decode_path"],
        )
        for row in result["generation"]
    ]
    columns = (
        "whole model",
        "batch",
        "prompt tokens/s",
        "new tokens/s",
        "x float32",
        "bandwidth bound",
        "MB per step",
        "decoder",
    )
    return plain_table("tokens per second of all texts of a batch together", columns, rows)


def speed_notes(result: dict[str, Any]) -> list[str]:
    """Remarks on the tables: kernels that refused layers, what was not measured, other programs running meanwhile."""
    refused = sorted({row["refused"] for row in result["layers"] if row["refused"]})
    taken = [row["elsewhere"] for row in (*result["layers"], *result["generation"]) if row["elsewhere"] is not None]
    found = [f"without kernels: {reason}" for reason in refused]
    found += result["notes"]
    if taken and max(taken) > 0.1:
        effect = "wall times are unreliable" if result["threads"] > 1 else "memory is slower, too"
        found.append(f"other programs used up to {max(taken):.0%} of the processor meanwhile: {effect}")
    return found


def speed_picture(result: dict[str, Any], path: Path) -> str | None:
    """Plot tokens per second by batch, of new and of prompt tokens, into a file.

    Returns:
        None, or why there is no picture.
    """
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is missing (python -m pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), dpi=110)
    for panel, key in zip(panels, ("new", "prompt"), strict=True):
        for contender in dict.fromkeys(row["contender"] for row in result["generation"]):
            own = [row for row in result["generation"] if row["contender"] == contender]
            batches, rates = [row["batch"] for row in own], [row[f"{key}_tokens_per_second"] for row in own]
            panel.plot(batches, rates, marker="o", label=contender, color=_COLOURS.get(contender))
            if key == "new":
                bounds = [row["new_tokens_per_second_bound"] for row in own]
                panel.plot(batches, bounds, linestyle=":", linewidth=1, color=_COLOURS.get(contender))
        _axes(panel, sorted({row["batch"] for row in result["generation"]}), f"{key} tokens")
    panels[0].set_title("dotted: bound by memory bandwidth", fontsize=9)
    panels[1].legend()
    figure.suptitle(f"{Path(result['model']).name}, {result['threads']} threads, {result['machine']['processor']}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
    return None


def _axes(panel: Any, batches: Sequence[int], unit: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(batches, [str(batch) for batch in batches])
    panel.set_xlabel("batch")
    panel.set_ylabel(f"{unit} per second, all texts")
    panel.grid(which="both", alpha=0.2)


def tiles_table(result: dict[str, Any]) -> Table:
    """A row per kind of layer and class of batches: the fastest tile, and its time compared with the previous tile's."""
    rows = []
    for row in result["rows"]:
        tile = row["after"]
        size = f"{tile['rows']} x {tile['tokens']}, {tile['warps']} warps, {tile['stages']} stages, {tile['waves']} waves"
        before, after = row["seconds_before"], row["seconds_after"]
        figures = f"{before * 1e6:.1f}", f"{after * 1e6:.1f}", f"{before / after:.2f}"
        rows.append((row["kind"], size, str(row["batch"]), *figures))
    return plain_table(
        f"tiles on {result['gpu']}, {result['dtype']}", ("layers", "tile", "batch", "us before", "us", "ratio"), rows, left=2
    )
