"""Which models slimlm compresses: every class of causal language models that transformers has, tried as a tiny random model.

    python benchmarks/families.py run                       # into benchmarks/results/families.json
    python benchmarks/families.py run --again --only qwen3 --only 'gemma*'
    python benchmarks/families.py page                      # docs/models.md, of that file

Models that the file holds are passed over, so that an interrupted run is resumed; `--again` tries them again. Results with
other versions of slimlm, torch or transformers than the installed ones are dropped, so that all in the file are of the same.

A model is saved in bfloat16, compressed by `absmax` from 8 samples of 32 tokens, in batches of 4 samples, and opened by
`slimlm.load` and by transformers. Its logits are compared with those of the original class whose weights are those that the
compressed layers stand for. Multimodal models are saved whole, as users have them, and opened as AutoModelForCausalLM opens
them.

Each model has a process of its own and a time limit, so that one that hangs or dies stops nothing.
"""

import argparse
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import slimlm
from slimlm.core.errors import SlimlmError
from slimlm.events import Event
from slimlm.inference.generate import generate
from slimlm.models.experts import Experts, fused_in, take_apart
from slimlm.models.structure import put_weight
from slimlm.record import Record
from tiny_models import NOT_MADE, VARIANTS, made_text, save, tiny_model

RESULTS = Path(__file__).parent / "results" / "families.json"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- Written by benchmarks/families.py. -->", "<!-- As far as here. -->"
SECONDS = 180
"""What a model may take."""
LENGTH = 32
BATCH = 4
"""Samples: with more than one batch, what a block is called with may differ between batches."""
CLOSE = 1e-4
"""Of the largest logit. Both models multiply by the same float32 matrices: only sums may be made in another order, which moves
a logit by some 1e-6 of that, and no more than a few times this through tens of layers."""

Outcome = Literal["works", "refused", "not made", "fails"]


@dataclass(frozen=True)
class Row:
    """What came of one model."""

    model_type: str
    variant: str = ""
    """what of its config is not the default: a name in VARIANTS"""
    kind: str = ""
    """the class that transformers opens"""
    outcome: Outcome = "fails"
    words: str = ""
    """the message of a refusal, of `slimlm generate` alone where the model works; why no model was made; or what failed"""
    whole: bool = False
    """whether slimlm had to read the model as a whole, instead of block by block"""
    skipped: tuple[str, ...] = ()
    """matrices in the blocks that are not compressed, each once for all blocks"""
    trace: str = field(default="", compare=False)
    """where it failed; printed, and not among the results"""

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model_type} {self.variant}".rstrip()


class WrongError(Exception):
    """A compressed model that is not what it should be."""


# One model


def tried(row: Row, scratch: Path) -> Row:
    """Make the model, compress it and compare."""
    if row.key in NOT_MADE:
        return replace(row, outcome="not made", words=NOT_MADE[row.key])
    try:
        model = tiny_model(row.model_type, row.variant)
        folder = save(model.to(torch.bfloat16), scratch / "model")
        dense = opened(folder)
        with torch.no_grad():
            dense(tokens(), use_cache=False)
    except Exception as error:  # Transformers' code raises whatever it meets in a config that it cannot use.
        return failed(row, "no tiny model could be made", error)
    row = replace(row, kind=type(dense).__name__)
    text = scratch / "text.txt"
    made_text(text)
    out, events, told = scratch / "out", [], []
    try:
        with patch("slimlm.calibration.capture.TOKENS_AT_ONCE", BATCH * LENGTH):
            options: dict[str, Any] = {"recipe": "absmax", "data": str(text), "samples": 2 * BATCH, "length": LENGTH}
            found = slimlm.compress(folder, out, progress=events.append, notify=told.append, device="cpu", **options)
    except SlimlmError as error:
        left = sorted(path.name for path in scratch.iterdir() if path not in (folder, text))
        if any(map(is_work, events)) or left:
            return failed(row, f"refused after work had begun, leaving {left}", error)
        return replace(row, outcome="refused", words=str(error).replace(str(folder), "MODEL"))
    except Exception as error:  # The question here: does anything but a refusal come out?
        return failed(row, "compression", error)
    row = replace(row, whole=any("as a whole" in text for text in told), skipped=skipped(found.record))
    try:
        words = compare(dense, out, found.record)
    except Exception as error:  # Whatever fails is a defect.
        return failed(row, "compressed and written", error)
    return replace(row, outcome="works", words=words)


def is_work(event: Event) -> bool:
    """Whether an event says that a block is being compressed, or is."""
    return event.stage == "compress" and (event.done > 0 or event.doing in ("steps", "reconstruct", "propagate"))


def failed(row: Row, what: str, error: Exception) -> Row:
    """The row of a model that failed."""
    words = f"{what}: {type(error).__name__}: {str(error).strip()[:300]}"
    return replace(row, outcome="fails", words=words, trace="".join(traceback.format_exception(error))[-3000:])


def opened(folder: Path) -> PreTrainedModel:
    """The model that transformers opens for causal language modelling, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def tokens() -> Tensor:
    """Two texts of 32 tokens."""
    return torch.randint(1, 250, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def skipped(record: Record) -> tuple[str, ...]:
    """The matrices in the blocks that are not compressed, with numbers of blocks and experts left out."""
    names = [name for name, why in record.skipped.items() if why != "outside the blocks"]
    return tuple(sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}))


@torch.no_grad()
def compare(dense: PreTrainedModel, out: Path, record: Record) -> str:
    """Raise WrongError where the compressed model's logits, or what it writes, are not what the stored weights stand for.

    Returns:
        Why slimlm refuses to write with the model; empty where it writes.
    """
    before = dense(tokens(), use_cache=False).logits
    for name in fused_in(dense):
        take_apart(dense, name)
    close("the experts taken apart", dense(tokens(), use_cache=False).logits, before)
    if lost := sorted(only_routing(dense) & {layer.name for layer in record.layers}):
        raise WrongError(f"{lost[0]} only decides which experts are used, and was compressed")
    ours = slimlm.load(out, kernels="reference", dtype=torch.float32)
    theirs = opened(out)
    slimlm.use_kernels(theirs, "reference")
    for layer in record.layers:
        put_weight(dense.get_submodule(layer.name), ours.get_submodule(layer.name).parts().dense())
    expected = dense(tokens(), use_cache=False).logits
    if torch.allclose(expected, before, atol=1e-3):
        raise WrongError("four-bit weights change no logit: the comparison shows nothing")
    close("slimlm.load", ours(tokens(), use_cache=False).logits, expected)
    close("AutoModelForCausalLM", theirs(tokens(), use_cache=False).logits, expected)
    return same_text(dense, ours)


def close(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise WrongError where these logits `[samples, length, vocabulary]` are not equal but for rounding."""
    difference, most = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= CLOSE * most:
        raise WrongError(f"{what}: logits of up to {most:.3g} differ by up to {difference:.3g}")


@torch.enable_grad()
def only_routing(model: PreTrainedModel) -> set[str]:
    """The linear layers outside experts that act on the logits only by which experts are chosen, and by their weights.

    They are found by gradients: the weights that tokens give their experts depend on them, and the logits do not where the
    choice is held fixed. The experts must have been taken apart.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".experts." not in name}
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    chosen: dict[int, tuple[Tensor, Tensor]] = {}

    def record_choice(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        chosen[id(module)] = (args[1], args[2])

    def hold_choice(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index, weights = chosen[id(module)]
        return args[0], index, weights.detach()

    def acting(loss: Tensor) -> set[str]:
        for layer in layers.values():
            layer.weight.grad = None
        loss.backward()
        return {name for name, layer in layers.items() if layer.weight.grad is not None and bool(layer.weight.grad.any())}

    def drawn(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(5))

    try:
        for layer in layers.values():
            layer.weight.requires_grad_()
        handles = [module.register_forward_pre_hook(record_choice) for module in experts]
        model(tokens(), use_cache=False)
        picking = [weights for _, weights in chosen.values() if weights.requires_grad]
        if not picking:
            return set()
        choosing = acting(sum((weights * drawn(weights)).sum() for weights in picking))
        for handle in handles:
            handle.remove()
        handles = [module.register_forward_pre_hook(hold_choice) for module in experts]
        logits = model(tokens(), use_cache=False).logits
        return choosing - acting((logits * drawn(logits)).sum())
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)


def same_text(dense: PreTrainedModel, ours: PreTrainedModel) -> str:
    """Raise WrongError where slimlm writes other tokens than the original class, computed anew for each without a cache.

    Gives the message where slimlm refuses to write, else nothing.

    Models whose logits for a text change as it goes on (encoders, for example) are passed over.
    """
    text = tokens()[:, :8]
    whole = dense(tokens(), use_cache=False).logits[:, :8]
    if not torch.allclose(dense(text, use_cache=False).logits, whole, atol=CLOSE * float(whole.abs().max())):
        return ""
    for _ in range(6):
        text = torch.cat((text, dense(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    try:
        written = generate(ours, text[:, :8], max_new_tokens=6, stop_tokens=[]).tokens
    except SlimlmError as error:
        return str(error)
    if not torch.equal(written, text[:, 8:]):
        raise WrongError(f"slimlm writes {written.tolist()}, the original class {text[:, 8:].tolist()}")
    return ""


# All of them


def wanted(only: Iterable[str]) -> list[Row]:
    """The models to try: every type of the mapping, and the variants; those of which `only` has a pattern, if it has any."""
    rows = [Row(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES] + [Row(kind, name) for kind, name in VARIANTS]
    patterns = tuple(only)
    return [row for row in rows if not patterns or any(fnmatchcase(row.key, pattern) for pattern in patterns)]


def child(row: Row, pipe: Connection) -> None:
    """Try one model in a process of its own and send what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        found = tried(row, Path(scratch))
        pipe.send(replace(found, words=found.words.replace(scratch, "FOLDER")))


@dataclass(frozen=True)
class Running:
    """A model that is being tried."""

    row: Row
    process: Any
    pipe: Connection
    until: float

    @classmethod
    def start(cls, row: Row) -> "Running":
        """Begin in a new process, which has what this one has imported."""
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(row, theirs))
        process.start()
        theirs.close()
        return cls(row, process, ours, time.monotonic() + SECONDS)

    def result(self) -> Row | None:
        """What came of it; None: it is not done."""
        if self.pipe.poll():
            try:
                found = self.pipe.recv()
            except EOFError:
                found = replace(self.row, words="the process died")
        elif time.monotonic() < self.until:
            return None
        else:
            found = replace(self.row, words=f"it took more than {SECONDS} s")
            self.process.kill()
        self.process.join()
        return found


def about(path: Path) -> dict[str, Any]:
    """A file of results: versions, the date and the rows."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def versions() -> dict[str, str]:
    """The installed versions that a result depends on."""
    return {name: version(name) for name in ("slimlm", "torch", "transformers")}


def to_resume(path: Path) -> dict[str, Row]:
    """The rows of a file of results, by key; none where they are of other versions than the installed ones."""
    if path.exists() and (found := about(path)["versions"]) != versions():
        print(f"{path}: the results with {', '.join(f'{name} {found[name]}' for name in found)} are dropped", flush=True)
        return {}
    return results(path)


def results(path: Path) -> dict[str, Row]:
    """The rows of a file of results, by key; none where there is no file."""
    if not path.exists():
        return {}
    rows = about(path)["rows"]
    found = [Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}) for row in rows]
    return {row.key: row for row in found}


def write(path: Path, rows: dict[str, Row]) -> None:
    """The results, with the versions that they are about; what is not of use in a row is left out."""
    found = [{name: value for name, value in asdict(rows[key]).items() if value and name != "trace"} for key in sorted(rows)]
    text = json.dumps({"versions": versions(), "date": date.today().isoformat(), "rows": found}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def run(given: argparse.Namespace) -> int:
    """Try the models that are asked for and not in the file yet; the status says whether any failed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = to_resume(given.into)
    asked = wanted(given.only)
    waiting = [row for row in asked if given.again or row.key not in rows]
    running: list[Running] = []
    while waiting or running:
        while waiting and len(running) < given.jobs:
            running.append(Running.start(waiting.pop(0)))
        time.sleep(0.02)
        for each in list(running):
            if (row := each.result()) is not None:
                running.remove(each)
                rows[row.key] = row
                write(given.into, rows)
                print(f"{row.key}: {row.outcome}{': ' if row.words else ''}{row.words}\n{row.trace}", end="", flush=True)
    counts = Counter(rows[row.key].outcome for row in asked)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts["fails"] > 0)


# The page


def section(path: Path) -> str:
    """What the page says of the results: counts, and a table for each outcome."""
    run_of, rows = about(path), sorted(results(path).values(), key=lambda row: row.key)
    found = {outcome: [row for row in rows if row.outcome == outcome] for outcome in ("works", "refused", "fails", "not made")}
    tried_with = run_of["versions"]
    lines = [
        f"Tried on {run_of['date']} with transformers {tried_with['transformers']} and torch {tried_with['torch']}: "
        f"{len({row.model_type for row in rows})} model types, {len(rows)} models. {len(found['works'])} work, "
        f"{len(found['refused'])} are refused before the work, {len(found['fails'])} fail, and of {len(found['not made'])} no "
        "tiny model could be made.",
        "",
        "**Work**",
        "",
        "| model type | class | matrices in the blocks that are not compressed |",
        "|---|---|---|",
        *(f"| {row.key} | {row.kind}{' (read whole)' * row.whole} | {matrices(row.skipped)} |" for row in found["works"]),
        *(f"\n{row.key}: {row.words}." for row in found["works"] if row.words),
        "",
        "**Refused**, in these words (MODEL stands for the model's folder)",
        "",
        *worded(found["refused"]),
    ]
    if found["fails"]:
        lines += ["", "**Fail**", "", *worded(found["fails"])]
    return "\n".join([*lines, "", "**Not made**", "", *worded(found["not made"])])


def matrices(names: tuple[str, ...]) -> str:
    """The names of matrices within their blocks."""
    return ", ".join(
        sorted({f"`{name.rpartition('*.')[2] if '.experts.' in name else name.partition('*.')[2]}`" for name in names})
    )


def worded(rows: list[Row]) -> list[str]:
    """A table of models and messages."""
    escaped = [" ".join(row.words.replace("|", "\\|").replace("<", "&lt;").split()) for row in rows]
    return [
        "| model type | class | message |",
        "|---|---|---|",
        *(f"| {row.key} | {row.kind} | {words} |" for row, words in zip(rows, escaped, strict=True)),
    ]


def page(given: argparse.Namespace) -> int:
    """Write the results into the page, between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{section(given.into)}\n\n{END}{after}", encoding="utf-8")
    return 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    running = verbs.add_parser("run", help="try the models that the results do not hold yet")
    running.add_argument("--only", action="append", default=[], help="a pattern of models; may be given several times")
    running.add_argument("--again", action="store_true", help="try models again that the results hold")
    running.add_argument("--jobs", type=int, default=1, help="models that are tried at once")
    running.set_defaults(run=run)
    paging = verbs.add_parser("page", help="write docs/models.md")
    paging.set_defaults(run=page)
    for verb in (running, paging):
        verb.add_argument("--into", type=Path, default=RESULTS, help="the file of results")
    given = parser.parse_args()
    sys.exit(given.run(given))


if __name__ == "__main__":
    main()
