"""The GPU kernels compared with cuBLAS, other 4-bit kernels and what the GPU allows, in 500 seconds.

    python benchmarks/gpu.py                       # everything
    python benchmarks/gpu.py --batches 1 16        # some of it; rows that are not measured again stay
    python benchmarks/gpu.py --markdown            # the tables, from the results alone
    python benchmarks/gpu.py --into docs/performance.md   # the same, written into that page
    python benchmarks/gpu.py --device cpu          # the control flow, in Triton's interpreter; times mean nothing

Products are replayed from a CUDA graph that goes through copies of the weight of 280 MB together, so that none is in the L2
cache; figures are medians of replays. Before anything is timed, layers of the same kinds are compared with float64 products,
repeated, and replayed on other inputs. What cannot be measured is named in the results with the reason. Weights are random, and
so is the model that writes text: one with the shapes of Llama-2-7B, made on the GPU.

Models come before layers, and layers of ours before those of others, so that what the time does not suffice for is the least of
it. Every item has a limit, and what fails is one item. Only a GPU that no longer responds ends the run, which is named then.
"""

import argparse
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llama_shape import LlamaShape
from results_file import Results, slug, this_run
from slimlm.core.grid import storable
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.inference.generate import Generated, generate
from slimlm.runtime.backends.triton import Gpu, PreparedOnGpu, StackedLayers
from slimlm.runtime.dispatch import Selection
from slimlm.runtime.gpu import device as card
from slimlm.runtime.gpu import layout, products
from slimlm.runtime.gpu.tile_search import replayed_seconds
from slimlm.runtime.linear import CompressedLinear

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "Llama-2-13B": [(5120, 5120), (13824, 5120), (5120, 13824)],
    "Llama-2-70B": [(8192, 8192), (28672, 8192), (8192, 28672)],
    "Llama-3-8B": [(14336, 4096), (4096, 14336)],
}
"""`[out, in]`; shapes of an earlier model are not taken again"""
BATCHES = (1, 16, 64, 128)
ROTATED = 280_000_000
"""Bytes of weights before one is met again: several times any GPU's L2 cache."""
ERRORS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest output. Half of bfloat16's comes from rounding the adapter's middle."""

Call = Callable[[], Tensor]


class MissingError(Exception):
    """Why something cannot be measured here."""


class LateError(Exception):
    """It took too long."""


@dataclass(frozen=True)
class Contender:
    """One way to multiply, as one call for each copy of its weight."""

    name: str
    calls: Sequence[Call]
    bytes: float
    """of the weight, everything counted"""


@dataclass(frozen=True)
class Kind:
    """A kind of layer of ours."""

    sparse: bool = True
    group: int = 0
    """inputs of a scale; 0: one for all"""
    table: bool = False
    adapter: bool = False


KINDS = {
    "slimlm dense g128": Kind(sparse=False, group=128),
    "slimlm 2:4 one scale": Kind(),
    "slimlm 2:4 one scale + adapter": Kind(adapter=True),
    "slimlm 2:4 g32": Kind(group=32),
    "slimlm 2:4 g32, codebook + adapter": Kind(group=32, table=True, adapter=True),
}


# Random layers, made in the kernels' layout


def random_packed(rows: int, width: int, kind: Kind, where: torch.device) -> layout.Packed:
    """A weight of random codes; its words are drawn, not packed, so that large ones take no time."""
    padded, block = -(-rows // 64) * 64, 256 if kind.sparse else 128
    blocks = -(-width // block)
    size = (blocks, 3, padded, 8) if kind.sparse else (2 * blocks, padded, 8)
    words = torch.randint(-(2**31), 2**31, size, dtype=torch.int64, device=where).to(torch.int32)
    if kind.sparse:
        pairs = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.int32, device=where)
        places = torch.zeros(blocks, padded, 8, dtype=torch.int32, device=where)
        for group in range(8):
            places |= pairs[torch.randint(6, places.shape, device=where)] << (4 * group)
        words[:, 2] = places
    shape = (blocks, padded, max(1, block // kind.group)) if kind.group else (1,)
    dtype = torch.float16 if kind.group and block == kind.group else torch.float32
    scale = torch.full(shape, 0.4 / width**0.5, dtype=dtype, device=where)
    levels = torch.linspace(-1, 1, 16, device=where) if kind.table else None
    return layout.Packed(words, scale, levels, rows, width)


def random_ready(shape: tuple[int, int], kind: Kind, where: torch.device) -> PreparedOnGpu:
    """A layer with, where wanted, an adapter of 0.1 x the smaller side, 4 bits in groups of 128."""
    right = tail = None
    if kind.adapter:
        rank = -(-min(shape) // 640) * 64
        right = random_packed(rank, shape[1], Kind(sparse=False, group=128), where)
        words = random_packed(shape[0], rank, Kind(sparse=False), where).words[: rank // 64]
        scale = torch.full((-(-shape[0] // 128), rank), 0.01, dtype=torch.float16, device=where)
        tail = layout.Tail(layout.Packed(words, scale, None, shape[0], rank), 128, None)
    counters = torch.zeros(layout.MOST_TILES * max(shape) // 64 + 64, dtype=torch.int32, device=where)
    base = random_packed(*shape, kind, where)
    return PreparedOnGpu(layout.GpuLayer(base, right, tail, None, counters), None)


def copies(make: Callable[[], Any], bytes_: float, where: torch.device) -> list[Any]:
    """As many as take ROTATED bytes together."""
    return [make() for _ in range(1 if where.type == "cpu" else max(1, min(64, round(ROTATED / bytes_))))]


# Contenders

Makers = Iterator[tuple[str, Callable[[], Contender]]]
"""Contenders by name, made when called."""


def own_contenders(shape: tuple[int, int], x: Tensor) -> Makers:
    """cuBLAS, and every kind of layer of ours."""
    yield "cuBLAS", lambda: cublas(shape, x)
    for name, kind in KINDS.items():
        yield name, lambda name=name, kind=kind: ours(name, kind, shape, x)


def other_contenders(shape: tuple[int, int], x: Tensor) -> Makers:
    """Other people's kernels."""
    yield "torch int4 g128", lambda: torch_int4(shape, x)
    yield "humming int4", lambda: humming(shape, x)
    yield "cuSPARSELt 2:4", lambda: cusparselt(shape, x)


def dense_weight(shape: tuple[int, int], x: Tensor) -> Tensor:
    """Random, in the dtype of x."""
    return torch.randn(shape, dtype=x.dtype, device=x.device) * 0.02


def cublas(shape: tuple[int, int], x: Tensor) -> Contender:
    """torch's linear."""
    size = shape[0] * shape[1] * x.element_size()
    weights = copies(lambda: dense_weight(shape, x), size, x.device)
    return Contender("cuBLAS", [lambda w=w: F.linear(x, w) for w in weights], size)


def ours(name: str, kind: Kind, shape: tuple[int, int], x: Tensor) -> Contender:
    """The kernels of this project."""
    gpu, first = Gpu(), random_ready(shape, kind, x.device)
    size = first.layer.bytes()
    layers = [first, *copies(lambda: random_ready(shape, kind, x.device), size, x.device)[1:]]
    return Contender(name, [lambda layer=layer: gpu.matmul(x, layer) for layer in layers], size)


def torch_int4(shape: tuple[int, int], x: Tensor) -> Contender:
    """torch's own 4-bit product, which wants bfloat16."""
    if x.device.type != "cuda":
        raise MissingError("its weight layout is another on the CPU")
    out, width = shape
    size = out * width * (0.5 + 4 / 128)

    def make() -> tuple[Tensor, Tensor]:
        codes = torch.randint(256, (out, width // 2), device=x.device, dtype=torch.int32).to(torch.uint8)
        scales = torch.rand(width // 128, out, 2, device=x.device, dtype=torch.bfloat16) * 0.01
        return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales

    narrow = x.bfloat16()
    weights = copies(make, size, x.device)
    calls = [lambda w=w, s=s: torch.ops.aten._weight_int4pack_mm(narrow, w, 128, s) for w, s in weights]
    return Contender("torch int4 g128", calls, size)


def humming(shape: tuple[int, int], x: Tensor) -> Contender:
    """humming-kernels' dense 4-bit layer."""
    if find_spec("humming") is None:
        raise MissingError("humming is not installed: python -m pip install humming-kernels")
    from humming.layer import HummingLayer

    def make() -> Any:
        layer = HummingLayer(shape_n=shape[0], shape_k=shape[1], weight_config={"dtype": "int4"}, torch_dtype=x.dtype)
        layer = layer.to(x.device)
        layer.load_from_unquantized(dense_weight(shape, x))
        layer.transform()
        return layer

    size = shape[0] * shape[1] * 0.5
    return Contender("humming int4", [lambda layer=layer: layer(x) for layer in copies(make, size, x.device)], size)


def cusparselt(shape: tuple[int, int], x: Tensor) -> Contender:
    """2:4 of 16 bits through torch; for fewer than 8 tokens the rest is zeros."""
    if x.device.type != "cuda":
        raise MissingError("it needs a GPU")
    from torch.sparse import to_sparse_semi_structured

    def make() -> Tensor:
        weight = dense_weight(shape, x)
        weight.view(-1, 4)[:, 2:] = 0
        return to_sparse_semi_structured(weight)

    size = shape[0] * shape[1] * 9 / 8
    eight = x if len(x) >= 8 else F.pad(x, (0, 0, 0, 8 - len(x)))
    return Contender("cuSPARSELt 2:4", [lambda w=w: F.linear(eight, w) for w in copies(make, size, x.device)], size)


# Timing


def seconds(calls: Sequence[Call], where: torch.device, *, least: int = 32) -> float:
    """The median time of one call, replayed from a graph; on the CPU that of one plain call."""
    if where.type == "cpu":
        began = time.perf_counter()
        calls[0]()
        return time.perf_counter() - began
    return replayed_seconds(calls, least=least)


def ceilings(where: torch.device) -> dict[str, float]:
    """Bytes a second of a copy (read and written), operations a second of a large product, seconds of an empty launch."""
    size = 2**14 if where.type == "cpu" else 2**30
    both = torch.zeros(2, size, device=where)
    copied = both.numel() * 4 / seconds([lambda: both[0].copy_(both[1])], where, least=4)
    side = 64 if where.type == "cpu" else 8192
    square = torch.randn(side, side, dtype=torch.bfloat16, device=where)
    rate = 2 * side**3 / seconds([lambda: square @ square], where, least=4)
    one = torch.zeros(1, device=where)
    return {"copy": copied, "matrix": rate, "launch": seconds([lambda: one.add_(1)], where, least=256)}


# Correctness


Checked = dict[str, list[dict[str, Any]] | str]
"""What `check` found of each kind, or why it was not checked or is wrong."""


def checked(where: torch.device, most: float) -> Checked:
    """`check` of every kind, for at most so many seconds together.

    On a GPU in a process for each, which between them compile the kernels for the timing.
    """
    if where.type == "cpu":
        return {name: check_or_why(name, where) for name in KINDS}
    began = time.monotonic()
    command = [sys.executable, str(Path(__file__)), "--check"]
    started = {name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in KINDS}
    return {name: answer(process, most - (time.monotonic() - began)) for name, process in started.items()}


def answer(process: "subprocess.Popen[str]", most: float) -> list[dict[str, Any]] | str:
    """What a process that checks has printed; one that takes longer is ended."""
    try:
        found = json.loads(process.communicate(timeout=max(1.0, most))[0])
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "its check took too long"
    except ValueError:
        return f"its check ended with status {process.returncode}"
    return str(found["failed"]) if isinstance(found, dict) else list(found)


def check_or_why(name: str, where: torch.device) -> list[dict[str, Any]] | str:
    """The rows, or a message on what went wrong."""
    try:
        return check(name, where)
    except Exception as error:
        return said(error)


def said(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def check(name: str, where: torch.device) -> list[dict[str, Any]]:
    """Rows with the largest error of layers packed from parts against float64 products, relative to the largest output."""
    shape, batches = ((64, 256), (1, 3)) if where.type == "cpu" else ((1536, 2048), (1, 7, 16, 33, 64, 128, 257))
    parts = random_parts(shape, KINDS[name])
    exact = parts.dense().double().to(where)
    gpu, rows = Gpu(), []
    ready = gpu.prepare(CompressedLinear.from_parts(parts, None).to(where).stored())
    for dtype in products.NARROW:
        worst = 0.0
        for batch in batches:
            x = torch.randn(batch, shape[1], device=where, dtype=dtype)
            y, expected = gpu.matmul(x, ready), x.double() @ exact.T
            worst = max(worst, float((y.double() - expected).abs().max() / expected.abs().max()))
            if not torch.equal(gpu.matmul(x, ready), y):
                raise RuntimeError(f"{name}, {dtype}, batch {batch}: the same product twice differs")
            if where.type == "cuda":
                replayed(gpu, ready, x)
        if not worst < ERRORS[dtype]:
            raise RuntimeError(f"{name}, {dtype}: error {worst:.2g}, where {ERRORS[dtype]:.2g} is allowed")
        rows.append({"contender": name, "dtype": str(dtype).removeprefix("torch."), "error": worst})
    rows.append({"contender": f"{name}, two at once", "dtype": "bfloat16", "error": check_together(name, shape, where)})
    if where.type == "cuda":
        # So many rows that the inputs are not split: other kernels, compiled here besides the others.
        tall = [random_ready((40960, 512), KINDS[name], where) for _ in range(2)]
        for batch in BATCHES:
            gpu.matmul(torch.randn(batch, 512, device=where, dtype=torch.bfloat16), tall[0])
        StackedLayers(tall)(torch.randn(1, 512, device=where, dtype=torch.bfloat16))
    return rows


def check_together(name: str, shape: tuple[int, int], where: torch.device) -> float:
    """The error of two layers in one launch, as text is written with, for one token in bfloat16."""
    each = [random_parts(shape, KINDS[name]) for _ in range(2)]
    ready = [Gpu().prepare(CompressedLinear.from_parts(parts, None).to(where).stored()) for parts in each]
    x, worst = torch.randn(1, shape[1], device=where, dtype=torch.bfloat16), 0.0
    for parts, y in zip(each, StackedLayers(ready)(x), strict=True):
        expected = x.double() @ parts.dense().double().to(where).T
        worst = max(worst, float((y.double() - expected).abs().max() / expected.abs().max()))
    if not worst < ERRORS[torch.bfloat16]:
        raise RuntimeError(f"{name}, two at once: error {worst:.2g}, where {ERRORS[torch.bfloat16]:.2g} is allowed")
    return worst


def replayed(gpu: Gpu, ready: PreparedOnGpu, x: Tensor) -> None:
    """Raise where a captured product gives another result than one that is launched."""
    fixed = x.clone()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
    with torch.cuda.device(x.device), torch.cuda.graph(graph, stream=side):
        y = gpu.matmul(fixed, ready)
    fixed.normal_()
    graph.replay()
    if not torch.equal(y, gpu.matmul(fixed, ready)):
        raise RuntimeError("a captured product differs from one that is launched")


def random_parts(shape: tuple[int, int], kind: Kind) -> Parts:
    """Parts on the CPU, as a checkpoint has them."""
    groups = -(-shape[1] // kind.group) if kind.group else 1
    group: Any = kind.group or "per-tensor"
    scale = storable(0.01 + 0.02 * torch.rand(shape[0] if kind.group else 1, groups))
    base: Uniform | Codebook = Uniform(torch.randint(-8, 8, shape, dtype=torch.int8), scale, 4, group)
    if kind.table:
        index = torch.randint(16, shape, dtype=torch.uint8)
        base = Codebook(index, torch.linspace(-1.5, 1.6, 16).pow(3).half(), scale, 4, group)
    first = Pruned(base, choose(torch.randn(shape), Pattern.parse("2:4")), "2:4") if kind.sparse else base
    if not kind.adapter:
        return Parts(first)
    rank = min(shape) // 10
    sides = [
        Uniform(
            torch.randint(-8, 8, (rank, n), dtype=torch.int8), (0.01 + 0.02 * torch.rand(rank, -(-n // 128))).half(), 4, 128
        )
        for n in shape
    ]
    return Parts(first, adapter=LowRank(*sides))


# A whole model


class Ours(CompressedLinear):
    """A layer of a model that nobody has compressed: it is in the kernels' layout and has no stored tensors."""

    def __init__(self, ready: PreparedOnGpu, shape: tuple[int, int]) -> None:
        super().__init__(shape, [], {}, None)
        self._selection, self._prepared = Selection(Gpu(), None), ready

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Ours":
        # There is nothing of torch's in it to move or to cast.
        return self


def random_model(kind: Kind | None, where: torch.device) -> LlamaForCausalLM:
    """Llama-2-7B's shapes (tiny ones on the CPU) with random weights in bfloat16; None: dense."""
    small = LlamaShape(64, 128, 1, 2, 2, vocabulary=64, context=512)
    model = (small if where.type == "cpu" else LlamaShape(4096, 11008, 32, 32, 32, context=512)).meta_model()
    if kind is not None:
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear):
                        shape = (linear.out_features, linear.in_features)
                        setattr(parent, name, Ours(random_ready(shape, kind, where), shape))
    model.to_empty(device=where)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    with where:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval().requires_grad_(False)


def written(name: str, kind: Kind | None, where: torch.device, batch: int) -> dict[str, Any]:
    """Tokens a second of a generation; `way` says what wrote them, on a GPU steps replayed from a CUDA graph."""
    model = random_model(kind, where)
    length, new, calls = (4, 3, 1) if where.type == "cpu" else (64, 48, 5)
    prompt = torch.randint(model.config.vocab_size, (batch, length), device=where)

    def once() -> Generated:
        return generate(model, prompt, max_new_tokens=new, stop_tokens=[])

    # Of the same shapes as those that are timed: it compiles, compares with the model's own forward and captures.
    once()
    gc.collect()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    made = [once() for _ in range(calls)]
    return {
        "section": "generation",
        "contender": name,
        "batch": batch,
        "new_tokens_per_second": median(one.new_rate or 0.0 for one in made),
        "prompt_seconds": median(one.prompt_seconds for one in made),
        "peak_memory": torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
        "way": made[0].decode_path,
        "counted": f"tokens 2 to {new} of each text after prompts of {length}; median of {calls} after one of these shapes",
    }


# The run

CHECKS, WRITING, LAYER = 200.0, 60.0, 40.0
"""Seconds that all checks, one model and one contender at one shape may take at most on a GPU."""
LAYERS_SHARE = 0.4
"""Of what is left after the checks, kept for the layers."""
SPARE = 5.0
"""Seconds with fewer than which nothing is begun."""


@contextmanager
def limited(most: float) -> Iterator[None]:
    """Raise LateError in what takes longer, once Python runs: a compiler or a GPU that is waited for comes back first."""

    def late(*_: object) -> None:
        raise LateError(f"took longer than {most:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, most))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Run:
    """A run of the benchmark: where, how long it may take, and what it has found."""

    def __init__(self, where: torch.device, budget: float, results: Results) -> None:
        self.where, self.budget, self.results = where, budget, results
        self.began = time.monotonic()
        self.lost: str | None = None
        """why the GPU no longer responds"""
        self.wrong: set[str] = set()
        """kinds whose check failed"""

    def left(self) -> float:
        """Seconds."""
        return self.budget - (time.monotonic() - self.began)

    def spent(self, what: str, reserve: float = 0.0) -> bool:
        """Whether there is no time left, or no GPU, for `what`, which is named then."""
        if self.lost is None and self.left() - reserve >= SPARE:
            return False
        self.results.missing[what] = self.lost or f"the budget of {self.budget:.0f} s was spent"
        return True

    def keep(self, row: dict[str, Any], *names: str) -> None:
        """Write a row; names under which it was missing are missing no longer."""
        self.results.add({"shape": [0, 0], "batch": 0, "dtype": "bfloat16", **row}, *names)
        self.results.write()

    def attempt(self, what: str, who: str, most: float, make: Callable[[], dict[str, Any]]) -> None:
        """Keep what is made, or say why there is nothing: of this item, or of this contender where it cannot be had here."""
        if self.spent(what):
            return
        try:
            with limited(min(most, self.left()) if self.where.type == "cuda" else self.left()):
                row = make()
        except (MissingError, ImportError) as error:
            self.results.missing[who] = str(error)
            return
        except Exception as error:
            self.results.missing[what] = f"failed: {said(error)}"
        else:
            self.keep(row, what, who)
            return
        if (reason := unfit(self.where)) is not None:
            self.lost = f"after {what} failed, the GPU {reason}"
        self.results.write()


def unfit(where: torch.device) -> str | None:
    """Why nothing more can be measured on a GPU after something failed there; None: it can."""
    if where.type == "cpu":
        return None
    try:
        # A capture that failed leaves its stream the current one, and can leave the allocator where it captures nothing more.
        torch.cuda.set_stream(torch.cuda.default_stream(where))
        cleared(where)
        one = torch.zeros(1, device=where)
        seconds([lambda: one.add_(1)], where, least=1)
        return None if float(one) > 1 else "replays nothing"
    except Exception as error:
        return f"captures nothing more: {said(error)}"


def cleared(where: torch.device) -> None:
    """Give back what is not used any more."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()


def measure(arguments: argparse.Namespace, where: torch.device, results: Results) -> None:
    """All sections, until the time is spent; every row is written at once."""
    run = Run(where, arguments.budget, results)
    run.attempt("ceilings", "ceilings", LAYER, lambda: {"section": "ceilings", "contender": "the card", **ceilings(where)})
    for name, found in checked(where, min(CHECKS, run.left())).items():
        if isinstance(found, str):
            run.wrong.add(name)
            results.missing[f"check, {name}"] = f"nothing of it is timed: {found}"
        for row in found if isinstance(found, list) else []:
            run.keep({"section": "correctness", **row}, f"check, {name}")
    reserve = LAYERS_SHARE * run.left() if where.type == "cuda" else 0.0
    for name, kind in {"cuBLAS": None, **KINDS}.items():
        for batch in arguments.batches[:1]:
            measure_writing(name, kind, batch, run, reserve)
    for makers in (own_contenders, other_contenders):
        for batch in arguments.batches:
            for model, shape in shapes(where):
                whole = f"{makers.__name__.split('_')[0]} {shape[0]} x {shape[1]}, batch {batch}"
                if not run.spent(whole):
                    measure_layer(model, shape, batch, run, makers)
                    results.found(whole)
    results.write()


def measure_writing(name: str, kind: Kind | None, batch: int, run: Run, reserve: float) -> None:
    """A model that writes."""
    what = f"generation, {name}"
    if name not in run.wrong and not run.spent(what, reserve):
        run.attempt(what, what, min(WRITING, run.left() - reserve), partial(written, name, kind, run.where, batch))
        cleared(run.where)


def shapes(where: torch.device) -> Iterator[tuple[str, tuple[int, int]]]:
    """Model and shape; a small one on the CPU."""
    if where.type == "cpu":
        yield "tiny", (64, 256)
        return
    for model, own in SHAPES.items():
        for shape in own:
            yield model, shape


def measure_layer(
    model: str, shape: tuple[int, int], batch: int, run: Run, makers: Callable[[tuple[int, int], Tensor], Makers]
) -> None:
    """One shape at one batch, by everyone."""
    x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device=run.where)

    def row(make: Callable[[], Contender]) -> dict[str, Any]:
        contender = make()
        taken = seconds(contender.calls, run.where)
        return {
            "section": "layers",
            "model": model,
            "shape": list(shape),
            "batch": batch,
            "contender": contender.name,
            "seconds": taken,
            "bytes": contender.bytes,
            "bytes_moved": contender.bytes + 2 * batch * (shape[0] + shape[1]),
            "bits_per_weight": 8 * contender.bytes / (shape[0] * shape[1]),
        }

    for name, make in makers(shape, x):
        if name not in run.wrong:
            run.attempt(f"{name} {shape[0]} x {shape[1]}, batch {batch}", name, LAYER, partial(row, make))


def markdown(data: dict[str, Any]) -> str:
    """Tables of the layers, for each shape: microseconds and times as fast as cuBLAS.

    The roof is the time in which the GPU copies as many bytes as the weight has.
    """
    layers = [row for row in data["rows"] if row["section"] == "layers"]
    lines, copied = [], None
    for ceiling in (row for row in data["rows"] if row["section"] == "ceilings"):
        copied = ceiling["copy"]
        lines.append(f"copy {ceiling['copy'] / 1e12:.2f} TB/s, bfloat16 {ceiling['matrix'] / 1e12:.0f} TFLOP/s\n")
    for shape in sorted({tuple(row["shape"]) for row in layers}):
        own = [row for row in layers if tuple(row["shape"]) == shape]
        batches = sorted({row["batch"] for row in own})
        base = {row["batch"]: row["seconds"] for row in own if row["contender"] == "cuBLAS"}
        titles = ["bits/weight", *(f"batch {b}, us" for b in batches), f"share of the roof at {batches[0]}"]
        lines += [f"{shape[0]} x {shape[1]}\n", "|  | " + " | ".join(titles) + " |"]
        lines.append("| --- |" + " ---: |" * len(titles))
        for name in dict.fromkeys(row["contender"] for row in own):
            rows = {row["batch"]: row for row in own if row["contender"] == name}
            cells = [
                f"{rows[b]['seconds'] * 1e6:.1f} ({base[b] / rows[b]['seconds']:.2f})" if b in rows and b in base else "-"
                for b in batches
            ]
            cells += ["-" if copied is None or batches[0] not in rows else f"{roof_share(rows[batches[0]], copied):.0%}"]
            lines.append(f"| {name} | {next(iter(rows.values()))['bits_per_weight']:.2f} | " + " | ".join(cells) + " |")
        lines.append("")
    for row in (row for row in data["rows"] if row["section"] == "generation"):
        memory = "" if row["peak_memory"] is None else f", {row['peak_memory'] / 1e9:.1f} GB"
        said_of_it = f"{row['way']}; {row['counted']}"
        rate = f"{row['new_tokens_per_second']:.1f} new tokens/s at batch {row['batch']}"
        lines.append(f"- {row['contender']}: {rate}{memory} ({said_of_it})")
    return "\n".join([*lines, *(f"- not measured: {name}: {reason}" for name, reason in data["missing"].items())])


def roof_share(row: dict[str, Any], copied: float) -> float:
    """The time of reading a layer's weight at the rate of a copy, over the time that the layer took."""
    return row["bytes"] / copied / row["seconds"]


BEGIN, END = "<!-- benchmarks/gpu.py: from here -->", "<!-- benchmarks/gpu.py: to here -->"


def put_into(page: Path, tables: str) -> None:
    """Replace what stands between the two marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{after}", encoding="utf-8")


def draw(data: dict[str, Any], path: Path) -> None:
    """Times as fast as cuBLAS by batch, one panel for each shape."""
    if find_spec("matplotlib") is None:
        sys.stdout.write("no picture: matplotlib is not installed\n")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [row for row in data["rows"] if row["section"] == "layers"]
    panels = sorted({tuple(row["shape"]) for row in layers})
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], panels, strict=True):
        own = [row for row in layers if tuple(row["shape"]) == shape]
        base = {row["batch"]: row["seconds"] for row in own if row["contender"] == "cuBLAS"}
        for name in dict.fromkeys(row["contender"] for row in own):
            points = sorted(
                (r["batch"], base[r["batch"]] / r["seconds"]) for r in own if r["contender"] == name and r["batch"] in base
            )
            axis.plot([str(b) for b, _ in points], [ratio for _, ratio in points], marker="o", label=name)
        axis.set_title(f"{shape[0]} x {shape[1]}", fontsize=9)
        axis.set_xlabel("batch")
    axes[0][0].set_ylabel("times as fast as cuBLAS")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> None:
    """Measure, write, show; or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--budget", type=float, default=500, help="seconds that all may take")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="show the tables of what was measured")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write the tables of cards into this page, between its marks")
    parser.add_argument("--check", choices=tuple(KINDS), help="only check one kind and print its rows, as the run itself does")
    arguments = parser.parse_args()
    where = torch.device(arguments.device)
    if arguments.markdown or arguments.into:
        tables = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in arguments.results.glob("gpu-*.json")}
        if arguments.markdown:
            sys.stdout.write("".join(f"{name}\n\n{markdown(tables[name])}\n" for name in sorted(tables)))
        if arguments.into:
            cards = [name for name in sorted(tables) if name != "gpu-interpreted"]
            if not cards:
                sys.exit(f"no GPU was measured: {arguments.results} has no gpu-CARD.json")
            pieces = [f"### {tables[name]['runs'][-1]['card']}\n\n{markdown(tables[name])}" for name in cards]
            put_into(arguments.into, "\n\n".join(pieces))
        return
    if (reason := card.refuses(where)) is not None:
        sys.exit(f"the GPU kernels cannot run here: {reason}")
    if arguments.check:
        found = check_or_why(arguments.check, where)
        sys.stdout.write(json.dumps({"failed": found} if isinstance(found, str) else found))
        return
    name = "interpreted" if where.type == "cpu" else torch.cuda.get_device_name(where)
    arguments.results.mkdir(parents=True, exist_ok=True)
    run = {**this_run("gpu.py", "triton", "humming-kernels"), "card": name, "runs_on": card.describe(where)}
    keys = ("section", "contender", "shape", "batch", "dtype")
    results = Results(arguments.results / f"gpu-{slug(name)}.json", keys, run)
    if where.type == "cuda":
        # Whatever hangs, and no limit reaches; the rows are written by then.
        faulthandler.dump_traceback_later(arguments.budget + 30, exit=True)
    measure(arguments, where, results)
    draw(results.to_dict(), results.path.with_suffix(".png"))
    sys.stdout.write(markdown(results.to_dict()) + "\n")


if __name__ == "__main__":
    main()
