"""The tables of `slimlm eval`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from slimlm.report.tables import pairs_table, plain_table, with_error
from slimlm.runtime.memory import format_bytes

if TYPE_CHECKING:
    from slimlm.evaluation.evaluate import Evaluation
    from slimlm.record import Divergence, Measured


def evaluation_tables(found: "Evaluation") -> Iterator[Table]:
    """A row per model; the divergence where there is an original; a row per task and metric."""
    rows = [
        (
            row.model,
            row.activations,
            f"{row.bits_per_weight:.3f}",
            format_bytes(row.bytes),
            "" if row.perplexity is None else with_error(row.perplexity, 4),
        )
        for row in found.models
    ]
    title = None
    if found.text is not None:
        title = f"{found.tokens} tokens of {found.text}, in {found.windows} windows of {found.length}"
    yield plain_table(title, ("model", "activations", "bits/weight", "size", "perplexity"), rows, left=2)
    if found.divergence is not None:
        yield pairs_table(_divergence_rows(found.divergence, found.rise))
    if any(row.tasks for row in found.models):
        scores = [{(s.task, s.metric): s for s in row.tasks} for row in found.models]
        names = list(dict.fromkeys(key for own in scores for key in own))
        tasks = [
            (
                task,
                metric,
                str(next(own[task, metric].items for own in scores if (task, metric) in own)),
                *(with_error(own[task, metric].score, 4) if (task, metric) in own else "" for own in scores),
            )
            for task, metric in names
        ]
        yield plain_table(None, ("task", "metric", "items", *(row.model for row in found.models)), tasks, left=2)


def _divergence_rows(found: "Divergence", rise: "Measured | None") -> list[tuple[str, str]]:
    top = found.same_top
    error = "" if top.standard_error is None else f" ± {top.standard_error:.2%}"
    rows = [
        ("KL to the original", f"mean {with_error(found.mean, 5)} nats per token"),
        ("", f"median {with_error(found.median, 5)}, 99th percentile {with_error(found.percentile_99, 4)}"),
        ("", f"largest {found.maximum:.3f}"),
        ("same top token", f"{top.value:.2%}{error}"),
    ]
    if rise is not None:
        rows.append(("rise of log-perplexity", f"{with_error(rise, 5)} nats per token"))
    if found.windows == 1:
        rows.append(("", "no standard errors: there is one window"))
    return rows
