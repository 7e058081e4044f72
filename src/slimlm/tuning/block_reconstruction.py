"""Block matching: tune a compressed block until its outputs come close to given ones.

    loss = sum ||block(x) - y||^2 / sum ||y||^2        x, y [windows, length, width]

Adam (arXiv 1412.6980) on what compression left continuous: scales, levels, adapters, 16-bit weights, norm weights and
biases. Masks stay. Codes of adapters, and those of the base where asked, move through latent codes: rounded on the way
forward, the gradient passed on unchanged (straight-through estimator, arXiv 1308.3432).

After each pass the block is put in the form in which it is stored and measured on windows that are held back. The best
form is kept, the untouched block among them: what is measured is what is stored, and it is never worse than before.

Source: TM of 3BASiL (arXiv 2603.01376) matches a block's outputs by Adam on surviving weights, adapters and norms. It
has no codes, one rate for all tensors, and keeps the last iterate. Here a rate is relative to its tensor's size, because
scales, factors and norms differ by orders of magnitude.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slimlm.calibration.capture import BlockInputs
from slimlm.core.errors import DataError, RecipeError
from slimlm.core.parts.pack import Parts
from slimlm.models.structure import LINEAR_KINDS, swap
from slimlm.runtime.linear import CompressedLinear

_SEED = 0
_DIVERGED = 10.0
"""Tuning stops where the held-back loss is this many times what it was at first."""

Step = tuple[int, Tensor]
"""A batch of the flow and the rows (int64) of it that are used."""


@dataclass(frozen=True)
class Matching:
    """How blocks are matched."""

    passes: int = 4
    """over the windows that are not held back"""
    rate: float = 0.02
    """Adam's first step for a tensor, as a share of the tensor's root mean square; it falls to zero as a cosine"""
    codes: Literal["frozen", "ste"] = "ste"
    """the base's codes: as they are, or moved through latent codes"""
    held_back: float = 0.125
    """share of the windows, but at least one, on which iterates are compared"""
    inputs: Literal["compressed", "dense", "asymmetric"] = "asymmetric"
    """For the caller. "compressed": inputs from the compressed blocks before, targets from the dense block on the same;
    "dense": both from the dense model; "asymmetric": inputs from the compressed blocks, targets from the dense model."""
    batch: int = 2
    """windows per step, at most as many as one batch of the flow holds"""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise RecipeError(f"passes = {self.passes}: block matching needs at least one pass over the windows")
        if not 0 < self.rate < 1:
            raise RecipeError(f"rate = {self.rate}: give the first step as a share of a tensor's size, between 0 and 1")
        if self.codes not in ("frozen", "ste"):
            raise RecipeError(f'codes = {self.codes!r}: give "frozen", or "ste" to move the codes of the base')
        if not 0 < self.held_back < 1:
            raise RecipeError(f"held_back = {self.held_back}: give a share of the windows, between 0 and 1")
        if self.inputs not in ("compressed", "dense", "asymmetric"):
            raise RecipeError(f'inputs = {self.inputs!r}: give "compressed", "dense" or "asymmetric"')
        if self.batch < 1:
            raise RecipeError(f"batch = {self.batch}: a step needs at least one window")


@dataclass(frozen=True)
class Matched:
    """What came of it: squared error over squared targets, on the windows held back, in the stored form."""

    before: float
    after: float
    kept_pass: int
    """the pass after which the block was best; 0 is the untouched block"""


def match_block(
    block: nn.Module,
    name: str,
    flow: BlockInputs,
    targets: Sequence[Tensor],
    options: Matching,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
) -> Matched:
    """Tune a block in place, on its inputs in `flow`, towards `targets`: `[windows, length, width]` per batch of the flow.

    name: the block's in the model. dtypes: what each tensor of the model is stored in, by full name. device: where the
    block is. A block that holds no compressed layer stays as it is, and so does a layer that is not compressed.
    Raises DataError where there is only one window.
    """
    windows = _Windows(name, flow, targets, device)
    train, held = windows.divided(options.held_back)
    best = _Form.of(block)
    before = after = windows.loss(block, best, held)
    if not best.layers:
        return Matched(before, before, 0)
    kept_pass = 0
    tuned = _Tuned(best, moving=options.codes == "ste")
    descent = _Descent(tuned, options, train)
    try:
        for done in range(1, options.passes + 1):
            descent.run_pass(block, windows)
            form = tuned.stored(name, dtypes)
            loss = windows.loss(block, form, held)
            if loss < after:
                best, after, kept_pass = form, loss, done
            if not loss < _DIVERGED * before:
                break
    finally:
        best.install(block)
    return Matched(before, after, kept_pass)


@dataclass(frozen=True)
class _Form:
    """What matching may change of a block."""

    layers: dict[str, nn.Module]
    """the compressed layers, by name in the block"""
    vectors: dict[str, Tensor]
    """float `[n]`: norm weights and biases outside linear layers, by name in the block"""

    @classmethod
    def of(cls, block: nn.Module) -> "_Form":
        layers: dict[str, nn.Module] = {n: m for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
        linears = {name for name, module in block.named_modules() if isinstance(module, (*LINEAR_KINDS, CompressedLinear))}
        vectors = {
            name: parameter.detach().clone()
            for name, parameter in block.named_parameters()
            if parameter.ndim == 1 and name.rpartition(".")[0] not in linears
        }
        return cls(layers, vectors)

    def put_layers(self, block: nn.Module) -> None:
        for name, layer in self.layers.items():
            swap(block, name, layer)

    def install(self, block: nn.Module) -> None:
        self.put_layers(block)
        with torch.no_grad():
            for name, vector in self.vectors.items():
                block.get_parameter(name).copy_(vector)


class _Windows:
    """Inputs and targets of one block, and what it makes of them."""

    def __init__(self, name: str, flow: BlockInputs, targets: Sequence[Tensor], device: torch.device) -> None:
        assert [h.shape for h in flow.hidden] == [t.shape for t in targets], "targets do not fit the flow"
        self.name = name
        self.flow = flow
        self.targets = targets
        self.device = device

    def divided(self, share: float) -> tuple[list[Step], list[Step]]:
        """The windows to train on and those held back, by batch of the flow; the same for every block."""
        sizes = [len(hidden) for hidden in self.flow.hidden]
        total = sum(sizes)
        if total < 2:
            raise DataError("block matching needs at least two calibration windows, one of them held back; there is one")
        count = min(max(1, round(share * total)), total - 1)
        held = torch.zeros(total, dtype=torch.bool)
        held[torch.randperm(total, generator=torch.Generator().manual_seed(_SEED))[:count]] = True
        masks = list(enumerate(held.split(sizes)))
        train = [(batch, (~mask).nonzero()[:, 0]) for batch, mask in masks if not mask.all()]
        return train, [(batch, mask.nonzero()[:, 0]) for batch, mask in masks if mask.any()]

    def error(self, block: nn.Module, form: _Form, step: Step) -> tuple[Tensor, Tensor]:
        """Squared error and squared targets, summed over the step's windows, of the block with the form's vectors."""
        batch, rows = step
        hidden, target = self.flow.hidden[batch], self.targets[batch][rows].to(self.device)
        args, kwargs = _rows_of(self.flow.arguments[self.name, len(hidden)], len(hidden), rows, self.device)
        hidden = hidden[rows].to(self.device)
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        output = functional_call(block, form.vectors, args, kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return (output - target).square().sum(), target.square().sum()

    def loss(self, block: nn.Module, form: _Form, steps: list[Step]) -> float:
        """Squared error over squared targets of the block in this form."""
        form.put_layers(block)
        with torch.no_grad():
            sums = torch.tensor([[float(s) for s in self.error(block, form, step)] for step in steps], dtype=torch.float64)
        error, energy = sums.sum(dim=0).tolist()
        return error / energy if energy else error


def _rows_of(value: Any, count: int, rows: Tensor, device: torch.device) -> Any:
    """A block's arguments for some windows of a batch of `count`, on the device.

    A tensor with the batch's size in front (masks, positions) is cut; one without serves all windows.
    """
    if isinstance(value, Tensor):
        return (value[rows] if value.ndim > 1 and len(value) == count else value).to(device)
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(v, count, rows, device) for v in value)
    if isinstance(value, dict):
        return {key: _rows_of(v, count, rows, device) for key, v in value.items()}
    return value


class _Descent:
    """Adam with a rate per tensor, over shuffled steps."""

    def __init__(self, tuned: "_Tuned", options: Matching, train: list[Step]) -> None:
        self.tuned = tuned
        self.batch = options.batch
        self.train = train
        self.generator = torch.Generator().manual_seed(_SEED)
        total = options.passes * len(list(self._steps()))
        groups = [{"params": [p], "lr": options.rate * _size(p)} for p in tuned.parameters]
        # Gradients shrink with the number of weights; Adam's usual 1e-8 would drown those of a large layer.
        self.adam = torch.optim.Adam(groups, eps=1e-15, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda done: (1 + math.cos(math.pi * done / total)) / 2)

    def _steps(self) -> Iterator[Step]:
        steps = []
        for batch, rows in self.train:
            shuffled = rows[torch.randperm(len(rows), generator=self.generator)]
            steps += [(batch, piece) for piece in shuffled.split(self.batch)]
        for i in torch.randperm(len(steps), generator=self.generator).tolist():
            yield steps[i]

    def run_pass(self, block: nn.Module, windows: _Windows) -> None:
        """One pass over the windows; ends early where the loss is no number."""
        form = self.tuned.form
        form.put_layers(block)
        for step in self._steps():
            with torch.enable_grad():
                error, energy = windows.error(block, form, step)
                if not error.isfinite():
                    return
                gradients = torch.autograd.grad(error / energy, self.tuned.parameters, materialize_grads=True)
            for parameter, gradient in zip(self.tuned.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.adam.step()
            self.schedule.step()


def _size(tensor: Tensor) -> float:
    """Root mean square of what is not zero; 0 for a tensor of zeros, which therefore stays."""
    return float(tensor.detach().square().sum() / max(1, int(tensor.count_nonzero()))) ** 0.5


class _Tuned:
    """A block's compressed layers and vectors as float parameters."""

    def __init__(self, form: _Form, *, moving: bool) -> None:
        self.layers: dict[str, _TunedLinear] = {}
        for name, layer in form.layers.items():
            assert isinstance(layer, CompressedLinear)
            self.layers[name] = _TunedLinear(layer, moving)
        vectors = {name: vector.float().clone().requires_grad_() for name, vector in form.vectors.items()}
        self.form = _Form(dict(self.layers), vectors)
        inner = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
        self.parameters = inner + list(vectors.values())

    def stored(self, block_name: str, dtypes: dict[str, torch.dtype]) -> _Form:
        """All rounded to what is stored."""
        layers: dict[str, nn.Module] = {}
        for name, layer in self.layers.items():
            bias = None if layer.bias is None else _rounded(layer.bias, dtypes[f"{block_name}.{name}.bias"])
            layers[name] = CompressedLinear.from_parts(layer.stored(), bias)
        vectors = {name: _rounded(vector, dtypes[f"{block_name}.{name}"]) for name, vector in self.form.vectors.items()}
        return _Form(layers, vectors)


def _rounded(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.detach().to(dtype, copy=True).float()


class _TunedLinear(nn.Module):
    """Stands in a compressed layer's place while it is tuned."""

    def __init__(self, layer: CompressedLinear, moving: bool) -> None:
        super().__init__()
        self.slots = {slot: part.trainable(codes=moving) for slot, part in layer.parts().filled()}
        self.registered = nn.ModuleList(self.slots.values())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        first, *added = self.slots.values()
        weight = first.dense()
        for part in added:
            weight = weight + part.dense()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def stored(self) -> Parts:
        """The parts in their stored form."""
        return Parts(**{slot: part.part() for slot, part in self.slots.items()})
