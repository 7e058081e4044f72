"""The demo: the bundled model compressed in several ways, the figures beside the original's. Offline, a few minutes.

The bundled model was trained on Python's standard library by examples/train_example_model.py; it is calibrated on one held-out
part of the library of this very Python and measured on another (see slimlm.data.stdlib).
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from slimlm.core.errors import ModelError
from slimlm.data.documents import documents
from slimlm.data.windows import token_stream, windows_of
from slimlm.evaluation.compare import OpenModel, open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.events import Event, Observer
from slimlm.pipeline import compress
from slimlm.report.tables import plain_table, size
from slimlm.storage.checkpoint import refuse_occupied

NAME = "pystd-5m"
RECIPES = ("absmax", "magnitude", "wanda", "slim", "best")
CALIBRATION_WINDOWS = 64
EVALUATION_TOKENS = 64 * 512
LENGTH = 512
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):"
_NEW_TOKENS = 80


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    seconds: float


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    rows: tuple[Row, ...]
    tokens: int
    prompt: str
    continuations: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def bundled_model() -> Path:
    """The folder of the bundled model: in the installed package, or in the source tree it is run from."""
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "bundled" / NAME, here.parents[3] / "examples" / NAME):
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(f"the bundled model {NAME} is not part of this installation; install slimlm from its source tree or wheel")


def run(out: Path | None, progress: Observer) -> Demo:
    """Compress the bundled model by each recipe; the last one's checkpoint is kept in `out` where that is given."""
    if out is not None:
        refuse_occupied(out)
    source = str(bundled_model())
    original = open_any(source)
    tokens = token_stream(original.tokenizer, documents("stdlib", "evaluation"), at_most=EVALUATION_TOKENS)
    windows = windows_of(tokens, LENGTH, source="stdlib")

    def measure(opened: OpenModel, name: str, seconds: float) -> Row:
        def told(done: int, total: int) -> None:
            progress(Event(f"{name}: evaluate", done, total))

        value = perplexity(opened.model, windows, progress=told)
        return Row(name, opened.bits_per_weight, opened.bytes, value.value, seconds)

    rows = [measure(original, "original", 0.0)]
    continuations = {"original": _go_on(original)}
    with tempfile.TemporaryDirectory(prefix="slimlm-demo-") as scratch:
        for recipe in RECIPES:
            last = recipe == RECIPES[-1]
            target = out if out is not None and last else Path(scratch) / recipe
            result = compress(
                source,
                target,
                recipe=recipe,
                data="stdlib",
                samples=CALIBRATION_WINDOWS,
                length=LENGTH,
                progress=_under(recipe, progress),
            )
            opened = open_any(str(target))
            rows.append(measure(opened, recipe, result.record.seconds))
            if recipe in ("magnitude", "best"):
                continuations[recipe] = _go_on(opened)
    return Demo(tuple(rows), windows[:, 1:].numel(), PROMPT, continuations)


def _under(name: str, progress: Observer) -> Observer:
    return lambda event: progress(dataclasses.replace(event, stage=f"{name}: {event.stage}"))


def table(shown: Demo) -> Table:
    """The demo's figures."""
    first = shown.rows[0]
    rows = [
        (
            row.name,
            f"{row.bits_per_weight:.2f}",
            size(row.bytes),
            f"{row.bytes / first.bytes:.0%}",
            f"{row.perplexity:.2f}",
            f"{row.perplexity - first.perplexity:+.2f}",
            f"{row.seconds:.0f} s" if row.seconds else "",
        )
        for row in shown.rows
    ]
    title = f"{NAME} on held-out modules of this Python's standard library ({shown.tokens} tokens)"
    return plain_table(title, ("", "bits/weight", "weights", "of original", "perplexity", "rise", "time"), rows)


def _go_on(opened: OpenModel) -> str:
    """What the model writes after the prompt: drawn with a low temperature from a fixed seed, so that it does not loop."""
    tokenizer = opened.tokenizer
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = opened.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            do_sample=True,
            temperature=0.5,
            pad_token_id=0,
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
