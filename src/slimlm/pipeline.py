"""READ FIRST. compress(): block by block: measure, apply the steps, swap, pass on.

    for block in blocks:
        for stage in stages(block):                     # layers whose inputs come about together; one stage unless sequential
            stats = measure(block, inputs)              # what the steps need, on the compressed prefix's outputs
            for each linear layer of the stage:
                layer = Layer.of(name, weight)
                for step in recipe.steps_for(layer):
                    layer = step(layer, stats)
                swap(layer, CompressedLinear(layer.parts(), bias))
        match(block)                                    # where the recipe asks for it
        inputs = block(inputs)                          # now the compressed block

That is slimlm.blockwise. Embedding and head follow where the recipe asks for it (slimlm.embedding). Then the packed tensors are
written, read back, and the reloaded model's logits compared with those in memory.
"""

import dataclasses
import fnmatch
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.blockwise import Progress, compress_blocks
from slimlm.core.errors import CheckpointError, DataError, ModelError, RecipeError, SlimlmError
from slimlm.core.layer import Need, refuse_not_finite
from slimlm.core.sweep import tokens_needed
from slimlm.data.documents import DEFAULT_DATA, documents
from slimlm.data.windows import choose_windows, sample_from_model, token_stream, windows_of
from slimlm.embedding import Ends, compress_ends, ends_of
from slimlm.evaluate.results import Record
from slimlm.load import load
from slimlm.models.opening import DenseModel, open_dense
from slimlm.models.structure import blocks_of, context_length, linears_of, weight_of
from slimlm.plan.options import Budget, Objective
from slimlm.plan.plan import (
    Plan,
    alternation_of,
    asked_budget,
    auto_budget,
    make_plan,
    refuse_budget,
    refuse_few_windows,
)
from slimlm.recipe import Recipe, check_embedding_bits, open_recipe
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint

_READ_AHEAD = 8
"""Calibration windows are drawn from up to this many times the text they need."""


@dataclass(frozen=True)
class Calibration:
    """Where the calibration text comes from and how much of it is used."""

    data: str = DEFAULT_DATA
    """a .txt, .jsonl or .parquet file or folder, a hub data set, "stdlib", or "self" (the model's own text)"""
    samples: int = 128
    length: int = 2048
    """tokens per window; at most the model's context"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise DataError(
                f"samples = {self.samples}, length = {self.length}: calibration needs at least one window of two tokens"
            )


@dataclass(frozen=True)
class Result:
    """What `compress` gives back."""

    path: Path
    record: Record


Tell = Callable[[str], None]
"""Told in words what the user should know."""

DEFAULT_RECIPE = "best"


def silent(text: str) -> None:
    """Keeps what it is told to itself."""


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that says nothing."""
    del stage, done, total


def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    bits: float | None = None,
    objective: Objective = "size",
    embedding_bits: int | None = None,
    data: str | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = quiet,
    tell: Tell = silent,
) -> Result:
    """Compress a causal language model and write it to the folder `out`.

    model: a folder or a hub name. recipe: a shipped name, a .toml file or a Recipe. bits: average bits per weight that may be
    spent, everything counted; what each layer becomes is then planned (see slimlm.plan). embedding_bits: of input embedding and
    output head, 4 to 8, or 16 to leave them as they are stored; None: what the recipe says. data: see `Calibration`. device:
    "auto", "cpu" or "cuda"; one block at a time is there. tell: told in words what the user should know.
    Raises a SlimlmError in words for anything that would not work, before the work begins wherever that can be known.
    """
    began = time.monotonic()
    checkpoint.refuse_occupied(Path(out))
    wanted = Calibration(data or DEFAULT_DATA, samples, length, seed)
    ready = prepare(str(model), asked_recipe(recipe, embedding_bits), bits, objective, wanted, device, progress, tell)
    dense, recipe = ready.dense, ready.recipe
    found = None
    if ready.budget is not None:
        found = planned(ready, progress)
        recipe = found.recipe(recipe)
    inside = sum(p.numel() for block in ready.blocks.values() for p in block.parameters() if p.ndim > 1)
    layers = compress_blocks(dense, ready.blocks, recipe, ready.windows, ready.device, progress)
    ends = compress_ends(dense.model, ready.ends)
    spent = sum(r.bits for r in layers) / sum(r.shape[0] * r.shape[1] for r in layers)
    if found is not None and found.objective == "size" and spent > found.asked_bits:
        tell(
            f"{spent:.3f} bits per weight were stored, over the {found.asked_bits:g} asked for: some scales are too small for "
            "float16, and their layers' take 32 bits. Ask for a little less"
        )
    record = Record(
        model=_own_name(str(model)),
        recipe=recipe.to_dict(),
        calibration={
            **dataclasses.asdict(wanted),
            "data": _own_name(wanted.data),
            "asked": samples,
            "samples": ready.windows.shape[0],
            "length": ready.windows.shape[1],
            "tokens": ready.windows.numel(),
        },
        layers=tuple(layers),
        ends=tuple(ends),
        left=ready.left,
        coverage=sum(r.shape[0] * r.shape[1] for r in layers) / inside,
        original_bytes=dense.bytes,
        stored_bytes=0,
        seconds=0.0,
        peak_memory=None,
        versions=_versions(),
        plan=None if found is None else found.to_dict(),
    )
    progress("write and verify", 0, 1)
    with checkpoint.written_beside(Path(out)) as folder:
        write(folder, dense)
        record = dataclasses.replace(record, stored_bytes=checkpoint.stored_bytes(folder))
        checkpoint.write_record(folder, record.to_dict())
        verify(folder, dense.model, ready.windows[:1])
        record = dataclasses.replace(record, seconds=time.monotonic() - began, peak_memory=peak_memory())
        checkpoint.write_record(folder, record.to_dict())
    progress("write and verify", 1, 1)
    return Result(Path(out), record)


def plan(
    model: str | Path,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    bits: float | None = None,
    objective: Objective = "size",
    embedding_bits: int | None = None,
    data: str | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = quiet,
    tell: Tell = silent,
) -> tuple[Plan, Recipe]:
    """Choose what each layer becomes within a budget; gives the plan and the recipe that carries it out.

    The arguments are those of `compress`; with `bits` left out the recipe must say rank = "auto".
    """
    wanted = Calibration(data or DEFAULT_DATA, samples, length, seed)
    ready = prepare(str(model), asked_recipe(recipe, embedding_bits), bits, objective, wanted, device, progress, tell)
    if ready.budget is None:
        raise RecipeError(
            f'there is nothing to plan: give --bits, or a recipe with rank = "auto" ({ready.recipe.name} has none)'
        )
    found = planned(ready, progress)
    return found, found.recipe(ready.recipe)


@dataclass(frozen=True)
class Ready:
    """A model, opened and checked, before any work."""

    dense: DenseModel
    blocks: dict[str, nn.Module]
    recipe: Recipe
    ends: Ends
    """what becomes of embedding and head"""
    left: dict[str, str]
    """layers that stay as they are, and why"""
    windows: Tensor
    device: torch.device
    budget: Budget | None
    """None where nothing is to be planned"""


def asked_recipe(recipe: str | Recipe, embedding_bits: int | None) -> Recipe:
    """The recipe, opened, with other bits for embedding and head where they are asked for."""
    found = open_recipe(recipe) if isinstance(recipe, str) else recipe
    if embedding_bits is None:
        return found
    return dataclasses.replace(found, embedding_bits=check_embedding_bits(embedding_bits, "embedding_bits"))


def prepare(
    model: str,
    recipe: Recipe,
    bits: float | None,
    objective: Objective,
    wanted: Calibration,
    device: str,
    progress: Progress,
    tell: Tell,
) -> Ready:
    """Open the model and check everything that can be checked; raises in words."""
    where = pick_device(device)
    planning = bits is not None or has_auto_rank(recipe)
    budget = None
    if bits is not None:
        budget = asked_budget(recipe, bits, objective)
    elif planning:
        alternation_of(recipe)
    elif objective != "size":
        raise RecipeError(f"--objective {objective} says what a budget counts, and there is none; give --bits")
    progress("open the model", 0, 1)
    dense = open_dense(model)
    progress("open the model", 1, 1)
    blocks = blocks_of(dense.model)
    ends = ends_of(dense.model, recipe.embedding_bits)
    left = refuse_early(dense.model, blocks, recipe, planning=planning)
    left = {name: reason for name, reason in left.items() if name != ends.head} | ends.left
    shapes = compressible(blocks, recipe)
    if planning and budget is None:
        budget = auto_budget(recipe, list(shapes.values()), objective)
    if budget is not None:
        refuse_budget(shapes, budget)
    windows = calibration_windows(dense, wanted, progress)
    if budget is not None:
        refuse_few_windows(len(windows))
    if recipe.matching is not None and len(windows) < 2:
        raise DataError("block matching holds windows back and needs at least 2; there is 1. Give more text or --samples")
    if recipe.needs & Need.GRAM:
        tell_of_few_tokens(shapes, windows.numel(), tell)
    return Ready(dense, blocks, recipe, ends, left, windows, where, budget)


def has_auto_rank(recipe: Recipe) -> bool:
    """Whether a plan has to give the layers their ranks."""
    return any(getattr(named.step, "rank", None) == "auto" for named in recipe.steps)


def compressible(blocks: dict[str, nn.Module], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Full name and shape (out, in) of every layer that the recipe compresses."""
    linears = {f"{block}.{name}": linear for block, module in blocks.items() for name, linear in linears_of(module).items()}
    shapes = {name: weight_of(linear).shape for name, linear in linears.items() if not recipe.leaves(name)}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def tell_of_few_tokens(shapes: dict[str, tuple[int, int]], tokens: int, tell: Tell) -> None:
    """Say so where the calibration text is too short for the covariance of the widest layer."""
    name, (_, width) = max(shapes.items(), key=lambda entry: entry[1][1])
    if tokens < tokens_needed(width):
        tell(
            f"calibration has {tokens} tokens, but the covariance of the widest layer ({name}, {width} inputs) needs "
            f"{tokens_needed(width)}: for layers with too few, what is measured between two inputs is shrunk and the original "
            "model's outputs are not followed. Give more text or --samples for a better result"
        )


def planned(ready: Ready, progress: Progress) -> Plan:
    """The plan for what was prepared with a budget."""
    assert ready.budget is not None
    return make_plan(
        ready.dense.model,
        ready.blocks,
        ready.recipe,
        ready.windows,
        budget=ready.budget,
        device=ready.device,
        progress=progress,
    )


def refuse_early(
    model: PreTrainedModel, blocks: dict[str, nn.Module], recipe: Recipe, *, planning: bool = False
) -> dict[str, str]:
    """Check every layer against the recipe before any work; gives the layers that stay as they are, and why.

    When a plan will choose pattern and rank, the recipe's own are not asked whether they fit.
    """
    left = {
        name: "outside the blocks"
        for name, module in linears_of(model).items()
        if not any(name.startswith(block + ".") for block in blocks)
    }
    if not any(linears_of(block) for block in blocks.values()):
        raise ModelError(
            f"the blocks of {type(model).__name__} ({next(iter(blocks))} and on) hold no linear layers: there is nothing to "
            "compress; slimlm knows nn.Linear and transformers' Conv1D"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            refuse_not_finite(name, tensor)
    known = [f"{block_name}.{name}" for block_name, block in blocks.items() for name in linears_of(block)]
    for pattern in recipe.leave:
        if not fnmatch.filter(known, pattern):
            raise RecipeError(f"leave = {pattern!r} matches no layer of the model; its layers are named like {known[0]}")
    for rule in recipe.rules:
        if unmatched := [pattern for pattern in rule.layers if not fnmatch.filter(known, pattern)]:
            raise RecipeError(f"a rule's {unmatched[0]!r} matches no layer of the model; its layers are named like {known[0]}")
    if all(map(recipe.leaves, known)):
        raise RecipeError(f"leave = {list(recipe.leave)} leaves no layer to compress")
    for block_name, block in blocks.items():
        for name, linear in linears_of(block).items():
            full = f"{block_name}.{name}"
            if recipe.leaves(full):
                left[full] = "left by the recipe"
                continue
            out, width = weight_of(linear).shape
            if not planning and (reason := recipe.refuses(full, (out, width))):
                raise ModelError(f'{reason}; or leave the layer out of the recipe (leave = ["*.{name}"])')
        linear_weights = {f"{name}.weight" for name in linears_of(block)}
        for name, parameter in block.named_parameters():
            if parameter.ndim > 1 and name not in linear_weights:
                left[f"{block_name}.{name}"] = f"{tuple(parameter.shape)}, not a linear layer that slimlm knows"
    return left


def calibration_windows(dense: DenseModel, wanted: Calibration, progress: Progress) -> Tensor:
    """Token windows `[count, length]` to calibrate on."""
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    tokenizer = dense.tokenizer
    if wanted.data == "self":
        start = None if tokenizer is None else tokenizer.bos_token_id
        pieces = []
        for piece in sample_from_model(dense.model, samples=wanted.samples, length=length, seed=wanted.seed, start=start):
            pieces.append(piece)
            progress("sample text", sum(map(len, pieces)), wanted.samples)
        return torch.cat(pieces)
    if tokenizer is None:
        raise DataError(f"{dense.source} has no tokenizer, so text cannot be read; add its files, or calibrate on 'self'")
    texts = documents(wanted.data, "calibration")
    tokens = token_stream(tokenizer, texts, at_most=_READ_AHEAD * wanted.samples * length)
    return choose_windows(windows_of(tokens, length, source=wanted.data), wanted.samples, wanted.seed)


def write(folder: Path, dense: DenseModel) -> None:
    """Write weights, config and tokenizer; what was not compressed is cast back to its stored dtype, bit for bit."""
    model = dense.model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear)}
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, CompressedEmbedding)}
    packed = {f"{name}.{tensor}" for name, module in (layers | embeddings).items() for tensor in module.packed_names}
    cast: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name in packed:
            tensors[name] = tensor.contiguous()
        else:
            # Tied tensors share memory before the cast and must share it after.
            tensors[name] = cast.setdefault(tensor.data_ptr(), tensor.to(dense.dtypes[name]).contiguous())
    checkpoint.write_weights(folder, tensors)
    looked_up = {name: module.about() for name, module in embeddings.items()}
    checkpoint.write_config(folder, dense.config, described(layers, embeddings), looked_up)
    if dense.tokenizer is not None:
        dense.tokenizer.save_pretrained(folder)
    if (dense.folder / "generation_config.json").is_file():
        shutil.copyfile(dense.folder / "generation_config.json", folder / "generation_config.json")


def described(layers: dict[str, CompressedLinear], embeddings: dict[str, CompressedEmbedding]) -> dict[str, dict[str, Any]]:
    """What a checkpoint's config says of compressed layers by name; of a tied one, whose tensors it multiplies by."""
    owners = {id(module): name for name, module in embeddings.items()}
    tied = {name: {"tied_to": owners[id(m.embedding)]} for name, m in layers.items() if isinstance(m, TiedLinear)}
    return {name: module.about() | tied.get(name, {}) for name, module in layers.items()}


def verify(folder: Path, model: PreTrainedModel, window: Tensor) -> None:
    """Open the folder as a user would; its tensors and its logits must be those in memory."""
    checkpoint.verify_files(folder)
    reloaded = load(folder, dtype=torch.float32, kernels="reference")
    theirs = reloaded.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, theirs[name]):
            raise CheckpointError(f"verification failed: {name} reads back different from what was written")
    with torch.no_grad():
        difference = (model(window).logits - reloaded(window).logits).abs().max()
    if not float(difference) < 1e-4:
        raise CheckpointError(f"verification failed: the reloaded model's logits differ by up to {float(difference):.3g}")


def pick_device(name: str) -> torch.device:
    """The device to compress on; "auto" is cuda where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise SlimlmError(f'device = {name!r}: give "auto", "cpu", "cuda" or "cuda:N"')
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SlimlmError("--device cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise SlimlmError(f'device = {name!r}: give "auto", "cpu", "cuda" or "cuda:N"') from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SlimlmError(f"device = {name!r}: torch finds {torch.cuda.device_count()} CUDA devices, counted from 0")
    return found


def peak_memory() -> int | None:
    """The most memory this process has held, in bytes, where the system tells."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _own_name(source: str) -> str:
    """A source's name without the folders above it, which are nobody else's business; a hub name as it is."""
    return Path(source).name if Path(source).exists() else source


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("slimlm", "torch", "transformers", "safetensors")}
    return {**found, "python": platform.python_version()}
