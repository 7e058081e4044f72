"""What is compared on real models: slimlm's recipes, solvers and budgets, and llama.cpp's file types.

A setting makes a model folder from a dense one. Embedding and head stay in 16 bits in all of them, so that what is compared is
the blocks. `settings` is the whole table:

    dense                       the model itself
    absmax, gptq, slim, ...     every shipped recipe by its name
    joint-BITS-GROUP            the step of `best` with other bits and groups
    gptq-asymmetric-BITS-GROUP  GPTQ on a grid with integer zero points
    budget-BITS                 `slimlm compress --bits`
    Q4_0, Q4_0+imatrix, ...     llama.cpp's file types, without and with an importance matrix
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import gguf_types
from accuracy import source_state
from gguf_types import ROLES, RULES, Place, Quantizer, type_of, write_rounded
from real_sources import Source, Texts
from slimlm.calibration.capture import BlockInputs, BlockRun, enter
from slimlm.calibration.capture import run as run_block
from slimlm.calibration.measurement import measure
from slimlm.calibration.samples import Calibration, draw_samples
from slimlm.cli.compress import QUALITY_FAILED
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.evaluation.compare import open_any
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.models.structure import blocks_of, linears_of
from slimlm.recipe import open_recipe, recipe_from_dict, shipped, to_toml


class SettingError(Exception):
    """A setting could not be made."""


@dataclass(frozen=True)
class Ground:
    """What all settings of a run have in common."""

    source: Source
    cache: Path
    texts: Texts
    samples: int
    length: int
    """tokens of a calibration sample"""
    blocks: int | None
    """the first blocks are compressed, and the others stay as they are; None: all are compressed"""
    ggml: Path | None
    """where libggml-base.so is; None: where llama-cpp-python brings it"""

    @property
    def dense(self) -> Path:
        """The folder of the dense model."""
        return self.cache / self.source.name / "dense"

    @property
    def calibration(self) -> str:
        """The calibration text in words."""
        return f"{self.samples} x {self.length} tokens of {self.texts.calibration.name}"


@dataclass(frozen=True)
class Made:
    """A model that a setting made, and what that took."""

    folder: str
    seconds: float
    cpu_seconds: float
    """of all threads"""
    peak_memory: int | None
    """of the process, in bytes; None: it was not one of its own"""
    bits: float | None = None
    """of the weights that were rounded; None: the checkpoint says it"""
    bytes: int | None = None
    """of all tensors as stored; None: the checkpoint says it"""


class Setting(Protocol):
    """A way to make a model."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """What it belongs to in a picture."""

    @property
    def drawn(self) -> bool:
        """Whether it reads calibration text, so that the seed makes a difference."""

    @property
    def state(self) -> str:
        """A short hash of the code that it depends on."""

    def make(self, ground: Ground, seed: int, out: Path) -> Made: ...


# slimlm's own


@dataclass(frozen=True)
class Ours:
    """`slimlm compress` with a shipped recipe, with steps that stand here, or with a budget."""

    name: str
    family: str
    recipe: str | None = None
    step: tuple[tuple[str, Any], ...] = ()
    """keys and values of the only step, where no recipe is named"""
    bits: float | None = None
    """the budget, where there are no steps either"""

    @property
    def drawn(self) -> bool:
        return self.recipe is None or bool(open_recipe(self.recipe).needs)

    @property
    def state(self) -> str:
        return source_state()

    def options(self, folder: Path) -> list[str]:
        """What the command line says; steps are written as a recipe into the folder.

        Raises:
            SlimlmError: This version has no such step, or not with these options.
        """
        if self.recipe is not None:
            return ["--recipe", self.recipe]
        if not self.step:
            return ["--bits", str(self.bits)]
        step = dict(self.step)
        about = {"name": self.name, "summary": "of the benchmark", "sequential": "joint" in step, "steps": [step]}
        path = folder / "recipe.toml"
        path.write_text(to_toml(recipe_from_dict(about, source=self.name)), encoding="utf-8")
        return ["--recipe", str(path)]

    def make(self, ground: Ground, seed: int, out: Path) -> Made:
        ignored = [] if ground.blocks is None else layers_of(opened(ground)).names[ground.blocks :]
        line = [
            sys.executable,
            "-c",
            "from slimlm.cli.app import main; main()",
            "compress",
            str(ground.dense),
            "--out",
            str(out),
        ]
        line += ["--embedding-bits", "16", "--data", str(ground.texts.calibration), "--samples", str(ground.samples)]
        line += ["--length", str(ground.length), "--seed", str(seed), "--quiet", "--json"]
        line += [word for block in ignored for word in ("--ignore", f"{block}.*")]
        with tempfile.TemporaryDirectory() as scratch:
            return timed([*line, *self.options(Path(scratch))], out)


def timed(line: Sequence[str], out: Path) -> Made:
    """Run a command in a process of its own and see what it took."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        words = " ".join(said.read().decode(errors="replace").split())[-600:]
    if process.returncode not in (0, QUALITY_FAILED):
        raise SettingError(f"`slimlm compress` ended with {process.returncode}: {words}")
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Made(str(out), seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * unit)


# llama.cpp's


@dataclass(frozen=True)
class FileType:
    """A file type of llama.cpp: matrices rounded by its quantizer, dequantized, and stored as a dense model."""

    file_type: str
    importance: bool
    family: str = "llama.cpp"

    @property
    def name(self) -> str:
        return self.file_type + "+imatrix" * self.importance

    @property
    def drawn(self) -> bool:
        return self.importance

    @property
    def state(self) -> str:
        return sha256(Path(gguf_types.__file__).read_bytes()).hexdigest()[:12]

    def make(self, ground: Ground, seed: int, out: Path) -> Made:
        """Round in this process; what measuring importances takes is not counted."""
        dense = opened(ground)
        kinds = self.kinds(dense, ground.blocks)
        try:
            ggml = Quantizer(ground.ggml)
            importance = importance_of(ground, seed) if self.importance else {}
            began, cpu = time.monotonic(), time.process_time()
            rounded = write_rounded(ground.dense, out, kinds, importance, ggml)
        except (ImportError, ValueError) as error:
            raise SettingError(str(error)) from error
        size = dense.bytes - rounded.replaced_bytes + rounded.bits // 8
        taken = time.monotonic() - began, time.process_time() - cpu
        return Made(str(out), *taken, None, rounded.bits / rounded.weights, size)

    def kinds(self, dense: LazyModel, blocks: int | None) -> dict[str, str]:
        """The type of each layer of the first blocks, by full name."""
        config, layers = dense.model.config, layers_of(dense)
        shared = config.num_attention_heads // config.num_key_value_heads
        found = {}
        for number, block in enumerate(layers.names[:blocks]):
            for layer in layers.inside[block]:
                place = Place(ROLES[layer.rpartition(".")[2]], number, len(layers.names), shared, self.importance)
                found[layer] = type_of(self.file_type, place, dense.weights[f"{layer}.weight"].shape[1])
        return found


@dataclass(frozen=True)
class Dense:
    """The model as it is, for its scores on tasks."""

    name: str = "dense"
    family: str = "dense"
    drawn: bool = False
    state: str = ""

    def make(self, ground: Ground, seed: int, out: Path) -> Made:
        shutil.copytree(ground.dense, out)
        return Made(str(out), 0.0, 0.0, None)


@dataclass(frozen=True)
class Layers:
    """The blocks of a model in order, and their linear layers by full name."""

    names: list[str]
    inside: dict[str, list[str]]


def layers_of(dense: LazyModel) -> Layers:
    """The blocks and layers of a model."""
    blocks = blocks_of(dense.model)
    return Layers(list(blocks), {name: [f"{name}.{layer}" for layer in linears_of(block)] for name, block in blocks.items()})


def opened(ground: Ground) -> LazyModel:
    """The dense model, its weights in the file."""
    return open_lazy(str(ground.dense), None, print)


@cache
def importance_of(ground: Ground, seed: int) -> dict[str, Tensor]:
    """The mean square of each input `[in]` of the layers to round, in the dense model, on slimlm's calibration samples."""
    wanted = Calibration(str(ground.texts.calibration), ground.samples, ground.length, seed)
    samples = draw_samples(opened(ground), wanted, print).samples
    model, device, found = open_any(str(ground.dense)).model, torch.device("cpu"), {}
    blocks = blocks_of(model)
    with torch.no_grad():
        inputs = enter(model, blocks, samples)
        for name, block in list(blocks.items())[: ground.blocks]:
            here = BlockRun(block, name, inputs, device)
            stats = measure(here, linears_of(block), frozenset({MeanSquare}))
            found |= {f"{name}.{layer}": own[MeanSquare] for layer, own in stats.items()}
            inputs = BlockInputs(list(run_block(here)), inputs.arguments)
    return found


# All of them


BITS, GROUPS, BUDGETS = (4, 3, 2), (128, 64, 32), (2.5, 3.0, 3.25, 3.5, 4.0, 4.25, 4.5)
NEED_IMPORTANCE = {"IQ2_XS", "IQ2_M", "IQ3_XXS"}
"""File types that llama.cpp does not make without an importance matrix."""


def settings() -> dict[str, Setting]:
    """Everything that can be measured, by name."""
    (best,) = open_recipe("best").steps
    found: list[Setting] = [Dense(), *(Ours(name, "recipes", recipe=name) for name in shipped())]
    for bits in BITS:
        for group_size in GROUPS:
            joint = {"joint": best.method, **asdict(best.step), "bits": bits, "group_size": group_size}
            found.append(Ours(f"joint-{bits}-{group_size}", "joint solver, dense", step=tuple(joint.items())))
            gptq = {"quantize": "gptq", "bits": bits, "group_size": group_size, "zero": True}
            found.append(Ours(f"gptq-asymmetric-{bits}-{group_size}", "asymmetric GPTQ", step=tuple(gptq.items())))
    found += [Ours(f"budget-{bits:g}", "budgets", bits=bits) for bits in BUDGETS]
    found += [FileType(name, False) for name in RULES if name not in NEED_IMPORTANCE]
    found += [FileType(name, True) for name in RULES]
    return {each.name: each for each in found}


def made(setting: Setting, ground: Ground, seed: int) -> Made:
    """The model of a setting; one of an earlier run that was kept, and that the same code made, is used again."""
    blocks = "all" if ground.blocks is None else str(ground.blocks)
    name = f"{setting.name}-{blocks}-{ground.samples}x{ground.length}-{seed}-{setting.state}"
    folder = ground.cache / ground.source.name / "made" / name
    about = folder / "made.json"
    if about.exists():
        return Made(**json.loads(about.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = setting.make(ground, seed, folder / "model")
    about.write_text(json.dumps(asdict(found)), encoding="utf-8")
    return found


def drop(found: Made) -> None:
    """Remove a made model."""
    shutil.rmtree(Path(found.folder).parent)
