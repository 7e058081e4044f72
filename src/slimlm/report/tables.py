"""What the command line shows: rich tables made from plain records."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from slimlm.record import Record


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


def pairs_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A name and what is to be said of it, one line each."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def layers_table(record: Record) -> Table:
    """A row per layer, embedding and head last where they are compressed."""
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
        for r in (*record.layers, *record.embeddings)
    )
    columns = ("layer", "out x in", "parts", "bits/weight", "sparsity", "rank", "error")
    return plain_table(None, columns, rows, left=3)


def options_table(plan: dict[str, Any]) -> Table:
    """A row per option of a plan: what it would cost and lose in all layers, and how many groups of layers took it."""
    groups = plan["choices"]
    weights = [group["weights"] for group in groups]
    rows = []
    for i, option in enumerate(plan["options"]):
        bits = sum(group["bits"][i] * own for group, own in zip(groups, weights, strict=True)) / sum(weights)
        losses = [group["losses"][i] for group in groups]
        loss = None if None in losses else sum(losses)
        mark = "the best single one that fits" if i == plan["uniform"] else ""
        rows.append((option["words"], f"{bits:.3f}", _loss(loss), str(sum(group["chosen"] == i for group in groups)), mark))
    columns = ("option", "bits/weight", "sum of losses", "groups that take it", "")
    return plain_table("every group of layers by itself (loss: KL per token to the original, in nats)", columns, rows)


def choices_table(plan: dict[str, Any]) -> Table:
    """A row per group of layers: what was chosen."""
    rows = []
    for group in plan["choices"]:
        first, *others = group["layers"]
        i = group["chosen"]
        name = ", ".join([first, *(other.rpartition(".")[2] for other in others)])
        rows.append((name, plan["options"][i]["words"], f"{group['bits'][i]:.3f}", _loss(group["losses"][i])))
    return plain_table(None, ("layers", "chosen", "bits/weight", "loss"), rows, left=2)


def plan_words(plan: dict[str, Any]) -> str:
    """The outcome of a plan in a sentence or two."""
    text = (
        f"{plan['bits_per_weight']:.3f} bits per weight of {plan['asked_bits']:.3f} asked for (counted by "
        f"{plan['objective']}); with every layer so: loss {_loss(plan['planned_loss'])}"
    )
    if plan["uniform"] is None:
        return text + ". No single option for all layers fits the budget."
    single = f"{plan['options'][plan['uniform']]['words']} in all layers: {_loss(plan['uniform_loss'])}"
    if plan["fallback"]:
        return text + f", but {single}. The mixture does not pay, so the single option was taken."
    return text + f"; {single}."


def generation_words(made: dict[str, Any]) -> tuple[str, str]:
    """How fast a text was written, how its tokens came about and why it stopped: two lines."""
    stopped = {"end": "an end token came", "length": "as many as asked for", "context": "the model's context is full"}
    rate = made["new_tokens_per_second"]
    after = f", {rate:.1f} tokens/s after the first" if rate is not None else ""
    return (
        f"prompt: {made['prompt_tokens']} tokens, {made['prompt_tokens_per_second']:.1f} tokens/s",
        f"new: {made['new_tokens']} tokens{after} ({stopped[made['stopped']]}); made by {made['way']}",
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def summary_table(record: Record, kernels: str) -> Table:
    """The totals of a compression; `kernels` says who would multiply its layers here."""
    errors = sorted(r.error for r in record.layers)
    worst = max(record.layers, key=lambda r: r.error)
    calibration = record.calibration
    asked = calibration.get("asked", calibration["samples"])
    fewer = "" if asked == calibration["samples"] else f" (asked for {asked}; the text gives no more)"
    others = "norms, position tables" if record.embeddings else "embeddings, norms"
    names = list(record.skipped)
    left = "".join(f", {name}" for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    named = ": ".join(text for text in (record.recipe["name"], record.recipe["summary"]) if text)
    rows = [
        ("recipe", named),
        ("calibration", f"{calibration['data']}, {calibration['samples']} samples of {calibration['length']} tokens{fewer}"),
        (
            "size",
            f"{size(record.original_bytes)} -> {size(record.stored_bytes)}"
            f" ({record.stored_bytes / record.original_bytes:.1%} of the original)",
        ),
        ("bits per weight", f"{record.bits_per_weight:.3f} in the {len(record.layers)} compressed layers, everything counted"),
        ("relative output error", f"median {errors[len(errors) // 2]:.4f}, largest {worst.error:.4f} ({worst.name})"),
        *_perplexity_row(record),
        *_reconstruction_row(record),
        *_plan_row(record),
        *_embedding_rows(record),
        ("coverage", f"{record.coverage:.1%} of the weights in the blocks; as they were: {others}{left}"),
        ("kernels", kernels),
        *_notes_row(record),
        ("time", f"{record.seconds:.1f} s" + (f", peak memory {size(record.peak_memory)}" if record.peak_memory else "")),
    ]
    return pairs_table(rows)


def _perplexity_row(record: Record) -> list[tuple[str, str]]:
    found = record.perplexity
    if found is None:
        return []
    return [("perplexity", f"{found.dense:.3f} -> {found.compressed:.3f} on {found.tokens} tokens of the calibration text")]


def verified_table(found: dict[str, Any]) -> Table:
    """What was found in a checkpoint's folder."""
    recorded, measured, left = found["recorded"], found["measured"], found["skipped"]
    named = f", {', '.join(left[:5])}" + (f" and {len(left) - 5} more" if len(left) > 5 else "") if left else ""
    rows = [
        ("folder", found["folder"]),
        (
            "tensors",
            f"{found['tensors']} in {found['shards']} files, {size(found['bytes'])}; checksums of {found['checksums']}",
        ),
        ("linear layers", f"{found['compressed']} compressed, {len(left)} left dense{named}"),
    ]
    if found["embeddings"]:
        rows.append(("embeddings", f"{found['embeddings']} compressed"))
    if recorded is not None:
        after = f"{recorded['dense']:.3f} -> {recorded['compressed']:.3f} on {recorded['tokens']} tokens"
        rows.append(("perplexity", f"{after}, as the run recorded it"))
    if measured is not None:
        rows.append(("perplexity", f"{measured['value']:.4f} on {measured['tokens']} tokens of the text"))
    rows += [("note", words) for words in found["notes"]]
    rows += [("wrong", words) for words in found["problems"]]
    return pairs_table([*rows, ("verdict", "sound" if found["sound"] else f"{len(found['problems'])} things are wrong")])


def _embedding_rows(record: Record) -> list[tuple[str, str]]:
    rows = []
    for end in record.embeddings:
        shape, bits = f"{end.shape[0]} x {end.shape[1]}", f"{end.bits_per_weight:.3f} bits per weight"
        also = "".join(f"; {note}" for note in end.notes)
        rows.append((end.name, f"{shape}, {end.parts}, {bits}, relative error of the weights {end.error:.4f}{also}"))
    return rows


def _reconstruction_row(record: Record) -> list[tuple[str, str]]:
    pairs = [layer.reconstruction for layer in record.layers if layer.reconstruction is not None]
    if not pairs:
        return []
    before, after = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    words = f"relative squared error of the blocks' outputs {before:.5f} -> {after:.5f}, on samples held back"
    return [("block reconstruction", words)]


def _plan_row(record: Record) -> list[tuple[str, str]]:
    return [] if record.plan is None else [("plan", plan_words(record.plan))]


def _notes_row(record: Record) -> list[tuple[str, str]]:
    told = [(layer.name, note) for layer in record.layers for note in layer.notes]
    if not told:
        return []
    others = f" ({len(told)} notes in all; see slimlm.json)" if len(told) > 1 else ""
    return [("note", f"{told[0][0]}: {told[0][1]}{others}")]
