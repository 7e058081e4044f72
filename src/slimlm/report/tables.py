"""The tables that the command line prints, from records and other plain data."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from slimlm.runtime.memory import format_bytes

if TYPE_CHECKING:
    # Importing these modules would take seconds.
    from slimlm.inference.generate import Generated
    from slimlm.record import Measured, Record, Tuning
    from slimlm.verification.folder import Verified

_NAMED = 5
"""The most names that a row lists before it counts the others."""


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


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values, a row each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def layers_table(record: "Record") -> Table:
    """A row per compressed layer; embedding and lm_head last where they are compressed. `LayerRecord` defines the errors."""
    rows = (
        (
            r.name,
            f"{r.shape[0]} x {r.shape[1]}",
            r.parts,
            f"{r.bits_per_weight:.3f}",
            f"{r.sparsity:.1%}",
            str(r.rank),
            f"{r.error:.4f}",
            "" if r.output_error is None else f"{r.output_error:.4f}",
        )
        for r in (*record.layers, *record.embeddings)
    )
    columns = ("layer", "out x in", "parts", "bits/weight", "sparsity", "rank", "diagonal error", "output error")
    return plain_table(None, columns, rows, left=3)


def options_table(plan: dict[str, Any]) -> Table:
    """A row per option of a plan: its bits and loss if all layers took it, and how many groups of layers were given it."""
    groups = plan["choices"]
    weights = [group["weights"] for group in groups]
    rows = []
    for i, option in enumerate(plan["options"]):
        bits = sum(group["bits"][i] * own for group, own in zip(groups, weights, strict=True)) / sum(weights)
        losses = [group["losses"][i] for group in groups]
        loss = None if None in losses else sum(losses)
        mark = "best single option within the budget" if i == plan["uniform"] else ""
        chosen = sum(group["chosen"] == i for group in groups)
        rows.append((option["description"], f"{bits:.3f}", _loss(loss), str(chosen), mark))
    columns = ("option", "bits/weight", "sum of losses", "groups given it", "")
    return plain_table(
        "each group of layers compressed alone (loss: KL divergence per token to the original, in nats)", columns, rows
    )


def choices_table(plan: dict[str, Any]) -> Table:
    """A row per group of layers: the chosen option."""
    rows = []
    for group in plan["choices"]:
        first, *others = group["layers"]
        i = group["chosen"]
        name = ", ".join([first, *(other.rpartition(".")[2] for other in others)])
        rows.append((name, plan["options"][i]["description"], f"{group['bits'][i]:.3f}", _loss(group["losses"][i])))
    return plain_table(None, ("layers", "chosen", "bits/weight", "loss"), rows, left=2)


def plan_summary(plan: dict[str, Any]) -> str:
    """The result of a plan in a sentence or two."""
    text = (
        f"{plan['bits_per_weight']:.3f} bits per weight of {plan['asked_bits']:.3f} asked for (counted by "
        f"{plan['objective']}); loss {_loss(plan['planned_loss'])} with all layers so compressed"
    )
    if plan["uniform"] is None:
        return text + ". No single option for all layers is within the budget."
    single = f"{plan['options'][plan['uniform']]['description']} in all layers: {_loss(plan['uniform_loss'])}"
    if plan["fallback"]:
        return text + f", but {single}. The mixture is no better, so the single option was chosen."
    return text + f"; {single}."


def generation_lines(made: "Generated") -> tuple[str, str]:
    """How fast a text was generated, by which decoder, and why it stopped: two lines."""
    stopped = {"end": "end of text", "length": "as many as asked for", "context": "the model's context is full"}
    after = f", {made.new_rate:.1f} tokens/s after the first" if made.new_rate is not None else ""
    return (
        f"prompt: {made.prompt_tokens} tokens, {made.prompt_rate:.1f} tokens/s",
        f"new: {made.tokens.shape[1]} tokens{after} ({stopped[made.stopped]}); made by {made.decode_path}",
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def summary_table(record: "Record", kernels: str) -> Table:
    """The totals of a compression.

    Args:
        record: The record.
        kernels: A description of the kernels that would run its layers on this machine.
    """
    calibration = record.calibration
    asked = calibration.get("asked", calibration["samples"])
    fewer = "" if asked == calibration["samples"] else f" (asked for {asked}; the text gives no more)"
    others = "norms, position tables" if record.embeddings else "embeddings, norms"
    skipped = "".join(f", {name}" for name in _first(record.skipped))
    named = ": ".join(text for text in (record.recipe["name"], record.recipe["summary"]) if text)
    rows = [
        ("recipe", named),
        ("calibration", f"{calibration['data']}, {calibration['samples']} samples of {calibration['length']} tokens{fewer}"),
        (
            "size",
            f"{format_bytes(record.original_bytes)} -> {format_bytes(record.stored_bytes)}"
            f" ({record.stored_bytes / record.original_bytes:.1%} of the original)",
        ),
        ("bits per weight", f"{record.bits_per_weight:.3f} in the {len(record.layers)} compressed layers, everything counted"),
        *_error_rows(record),
        *_perplexity_row(record),
        *_divergence_rows(record),
        *_reconstruction_row(record),
        *_plan_row(record),
        *_embedding_rows(record),
        ("coverage", f"{record.coverage:.1%} of the weights in the blocks; not compressed: {others}{skipped}"),
        *_source_rows(record),
        *_edited_row(record),
        ("kernels", kernels),
        *_notes_row(record),
        (
            "time",
            f"{record.seconds:.1f} s" + (f", peak memory {format_bytes(record.peak_memory)}" if record.peak_memory else ""),
        ),
    ]
    return pairs_table(rows)


def _source_rows(record: "Record") -> list[tuple[str, str]]:
    """What became of the tensors of the original's files, and of the other files."""
    source = record.source
    if source is None:
        return []
    apart = [
        f"{len(names)} {what} ({', '.join(_first(names))})"
        for names, what in ((source.unplaced, "stored as they are, outside the model"), (source.left_out, "left out"))
        if names
    ]
    inside = len(source.tensors) - len(source.unplaced) - len(source.left_out)
    tensors = "; ".join([f"{len(source.tensors)} tensors: {inside} in the model", *apart])
    lost = source.files_left_out
    named = f": {', '.join(_first(lost))} (slimlm.json says why)" if lost else ""
    kept = len(source.files) - len(lost)
    rounded = [] if source.stored_as is None else [("already rounded", f"the original's weights were {source.stored_as}")]
    return [
        ("original", tensors),
        *rounded,
        ("its files", f"{len(source.files)}: {kept} read, copied or replaced, {len(lost)} left out{named}"),
    ]


def _edited_row(record: "Record") -> list[tuple[str, str]]:
    """The tensors that were changed after the run, which the figures are not about."""
    if not record.edited:
        return []
    return [("edited", f"changed after the run, which the figures are about: {', '.join(_first(record.edited))}")]


def _error_rows(record: "Record") -> list[tuple[str, str]]:
    """The errors of layers: on the measured inputs where their covariance is known, and as if inputs were uncorrelated."""
    kinds = {
        "output error": [(r.output_error, r.name) for r in record.layers if r.output_error is not None],
        "diagonal error": [(r.error, r.name) for r in record.layers],
    }
    rows = []
    for kind, errors in kinds.items():
        if errors:
            errors.sort()
            median, (worst, name) = errors[len(errors) // 2][0], errors[-1]
            meaning = ", of inputs taken as uncorrelated: compares layers, not recipes" if kind == "diagonal error" else ""
            rows.append((kind, f"median {median:.4f}, largest {worst:.4f} ({name}){meaning}"))
    return rows


def _perplexity_row(record: "Record") -> list[tuple[str, str]]:
    found = record.perplexity
    if found is None:
        return []
    return [("perplexity", f"{found.dense:.3f} -> {found.compressed:.3f} on {found.tokens} tokens of the calibration text")]


def _divergence_rows(record: "Record") -> list[tuple[str, str]]:
    found = record.divergence
    if found is None:
        return []
    where = f"on {found.tokens} tokens of the calibration text that were held back"
    mean, tail = with_error(found.mean, 4), with_error(found.percentile_99, 3)
    error = "" if found.same_top.standard_error is None else f" ± {found.same_top.standard_error:.2%}"
    return [
        ("KL to the original", f"mean {mean} nats per token, 99th percentile {tail}, {where}"),
        ("same top token", f"{found.same_top.value:.2%}{error}"),
    ]


def with_error(found: "Measured", digits: int) -> str:
    """A figure and its standard error, to so many digits after the point."""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.{digits}f}"
    return f"{found.value:.{digits}f}{error}"


def verified_table(found: "Verified") -> Table:
    """The findings on a checkpoint's folder: whether it is what was written, and whether that was of use."""
    dense = "".join(f", {name}" for name in _first(found.skipped))
    rows = [
        ("folder", found.folder),
        ("tensors", f"{found.tensors} in {found.shards} files, {format_bytes(found.bytes)}; checksums of {found.checksums}"),
        ("linear layers", f"{found.compressed} compressed, {len(found.skipped)} dense{dense}"),
    ]
    if found.embeddings:
        rows.append(("embeddings", f"{found.embeddings} compressed"))
    if (recorded := found.recorded) is not None:
        change = f"{recorded['dense']:.3f} -> {recorded['compressed']:.3f} on {recorded['tokens']} tokens"
        rows.append(("perplexity", f"{change}, as the run recorded it"))
    if (measured := found.measured) is not None:
        rows.append(("perplexity", f"{measured['value']:.4f} on {measured['tokens']} tokens of the text"))
    rows += [("note", text) for text in found.notes]
    rows += [("problem", text) for text in found.problems]
    integrity = "sound" if found.sound else f"not sound: {len(found.problems)} problems"
    quality = {"ok": "ok, as the run measured it", "failed": "failed, as the run measured it"}.get(found.quality, found.quality)
    return pairs_table([*rows, ("integrity", integrity), ("quality", quality)])


def _first(names: Iterable[str]) -> list[str]:
    """The first names of many, and how many more there are."""
    listed = list(names)
    return listed if len(listed) <= _NAMED else [*listed[:_NAMED], f"{len(listed) - _NAMED} more"]


def _embedding_rows(record: "Record") -> list[tuple[str, str]]:
    rows = []
    for r in record.embeddings:
        shape, bits = f"{r.shape[0]} x {r.shape[1]}", f"{r.bits_per_weight:.3f} bits per weight"
        notes = "".join(f"; {note}" for note in r.notes)
        rows.append((r.name, f"{shape}, {r.parts}, {bits}, relative error of the weights {r.error:.4f}{notes}"))
    return rows


def _reconstruction_row(record: "Record") -> list[tuple[str, str]]:
    pairs = [layer.reconstruction for layer in record.layers if layer.reconstruction is not None]
    if not pairs:
        return []
    before, after = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return [
        (
            "block reconstruction",
            f"relative squared error of the blocks' outputs {before:.5f} -> {after:.5f}, on samples held back for this",
        )
    ]


def _plan_row(record: "Record") -> list[tuple[str, str]]:
    return [] if record.plan is None else [("plan", plan_summary(record.plan))]


def _notes_row(record: "Record") -> list[tuple[str, str]]:
    notes = [f"{layer.name}: {note}" for layer in record.layers for note in layer.notes]
    if not notes:
        return []
    return [("note", notes[0] + (f" ({len(notes)} notes in all; see slimlm.json)" if len(notes) > 1 else ""))]


def tuning_table(done: "Tuning") -> Table:
    """What a tuner did, before and after, on the windows that were held back."""
    first, last = done.before, done.after
    rows = [("loss", f"{first.loss:.5f}", f"{last.loss:.5f}")]
    if first.divergence is not None and last.divergence is not None:
        ours, theirs = first.divergence, last.divergence
        rows.append(("KL to the original", with_error(ours.mean, 5), with_error(theirs.mean, 5)))
        rows.append(("same top token", f"{ours.same_top.value:.2%}", f"{theirs.same_top.value:.2%}"))
    rows.append(("perplexity", with_error(first.perplexity, 4), with_error(last.perplexity, 4)))
    steps = f"{done.tokens} tokens of {done.data} in {done.steps} steps, best after step {done.best_step}"
    return plain_table(f"{done.method}: {steps}; on windows held back", ("", "before", "after"), rows)
