"""The table of `slimlm demo`: several compressed models compared with the original."""

from typing import TYPE_CHECKING

from rich.table import Table

from slimlm.display import duration
from slimlm.report.tables import plain_table
from slimlm.runtime.memory import format_bytes

if TYPE_CHECKING:
    from slimlm.bench.recipes import Comparison, Row


def comparison_table(found: "Comparison", title: str) -> Table:
    """A row per model: size and perplexity, each also relative to the original's."""
    original = found.rows[0]
    rows = [
        (
            row.name,
            row.what,
            f"{row.bits_per_weight:.2f}",
            format_bytes(row.bytes),
            f"{row.bytes / original.bytes:.0%}",
            f"{row.perplexity:.2f}",
            "" if row is original else f"{row.perplexity / original.perplexity - 1:+.1%}",
            "" if row is original else duration(row.seconds),
        )
        for row in found.rows
    ]
    columns = ("model", "what it is", "bits/weight", "size", "of original", "perplexity", "change", "time")
    return plain_table(title, columns, rows, left=2)


def row_line(row: "Row", original: "Row") -> str:
    """A row as a line of text, for a reader who waits for the others."""
    text = f"{row.name}: {row.bits_per_weight:.2f} bits/weight, {format_bytes(row.bytes)}, perplexity {row.perplexity:.2f}"
    if row is original:
        return text
    return f"{text} ({row.perplexity / original.perplexity - 1:+.1%}), {duration(row.seconds)}"
