"""Block reconstruction: tune a compressed block by gradient descent towards given outputs.

    loss = sum ||block(x) - y||^2 / sum ||y||^2        x, y [samples, length, width]

Adam (arXiv 1412.6980) tunes the continuous values: scales, codebooks, adapters, 16-bit weights, norm weights and biases. Masks
are fixed. Codes of adapters, and those of the base where asked, move through latent codes: rounded on the way
forward, the gradient passed on unchanged (straight-through estimator, arXiv 1308.3432).

After each pass the block is rounded to its stored form and measured on samples that are held back. The best form is used; the
untuned block is one of the candidates, so the loss on these samples never grows.

Source: TM of 3BASiL (arXiv 2603.01376) tunes a block's outputs by Adam on surviving weights, adapters and norms. It
has no codes, one rate for all tensors, and uses the last iterate. Here a rate is relative to its tensor's size, because
scales, factors and norms differ by orders of magnitude.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from slimlm.calibration.capture import BlockInputs
from slimlm.core.errors import DataError
from slimlm.core.parts.trainable import EVERYTHING, Trains
from slimlm.models.structure import swap
from slimlm.recipe import ReconstructionOptions
from slimlm.runtime.linear import CompressedLinear
from slimlm.tuning.trainable import TunedLinear, rounded, size_of, vectors_of

_SEED = 0
_DIVERGED = 10.0
"""Tuning stops where the held-back loss is this many times what it was at first."""

_Rows = tuple[int, Tensor]
"""The number of a batch of the inputs, and the rows of it that are used, int64 `[rows]`."""


@dataclass(frozen=True)
class ReconstructionResult:
    """The outcome of a block's reconstruction; losses are those of the stored form on the samples held back."""

    before: float
    """Squared error over squared targets before."""
    after: float
    """Squared error over squared targets after."""
    best_pass: int
    """The pass after which the loss was least; 0: the block was left as it was."""


def tune_block(
    block: nn.Module,
    name: str,
    inputs: BlockInputs,
    targets: Sequence[Tensor],
    options: ReconstructionOptions,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
) -> ReconstructionResult:
    """Tune a block's compressed layers, norms and biases in place; layers that are not compressed do not change.

    Args:
        block: The block, on the device, in float32.
        name: The block's full name in the model.
        inputs: The block's inputs, `[samples, length, width]` per batch.
        targets: The outputs to come close to, of the same shapes.
        options: How it is reconstructed.
        dtypes: What each tensor of the model is stored in, by full name.
        device: Where the block is.

    Returns:
        The losses before and after, which are equal where the block holds no compressed layer.

    Raises:
        DataError: There is only one sample.
    """
    samples = _Samples(name, inputs, targets, device)
    train, held = samples.divided(options.held_back)
    best = _Form.of(block)
    before = after = samples.loss(block, best, held)
    if not best.layers:
        return ReconstructionResult(before, before, 0)
    best_pass = 0
    tuned = _Tuned(best, moving=options.codes == "ste")
    descent = _Descent(tuned, options, train)
    try:
        for done in range(1, options.passes + 1):
            descent.run_pass(block, samples)
            form = tuned.stored(name, dtypes)
            loss = samples.loss(block, form, held)
            if loss < after:
                best, after, best_pass = form, loss, done
            if not loss < _DIVERGED * before:
                break
    finally:
        best.install(block)
    return ReconstructionResult(before, after, best_pass)


@dataclass(frozen=True)
class _Form:
    """The modules and vectors of a block that reconstruction may change."""

    layers: dict[str, nn.Module]
    """The compressed layers, by their names within the block."""
    vectors: dict[str, Tensor]
    """Norm weights and biases outside linear layers, float `[n]`, by their names within the block."""

    @classmethod
    def of(cls, block: nn.Module) -> "_Form":
        layers: dict[str, nn.Module] = {n: m for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
        vectors = {name: block.get_parameter(name).detach().clone() for name in vectors_of(block)}
        return cls(layers, vectors)

    def put_layers(self, block: nn.Module) -> None:
        for name, layer in self.layers.items():
            swap(block, name, layer)

    def install(self, block: nn.Module) -> None:
        self.put_layers(block)
        with torch.no_grad():
            for name, vector in self.vectors.items():
                block.get_parameter(name).copy_(vector)


class _Samples:
    """Inputs and targets of one block, and the error of its outputs on them."""

    def __init__(self, name: str, inputs: BlockInputs, targets: Sequence[Tensor], device: torch.device) -> None:
        assert [h.shape for h in inputs.hidden] == [t.shape for t in targets], "targets do not fit the inputs"
        self.inputs = inputs
        # Of this block alone, so that those which depend on the text are captured once for all passes.
        self.arguments = [inputs.arguments.of(name, batch, len(hidden)) for batch, hidden in enumerate(inputs.hidden)]
        self.targets = targets
        self.device = device

    def divided(self, share: float) -> tuple[list[_Rows], list[_Rows]]:
        """The samples to train on and those held back, by batch of the inputs; the same for every block."""
        sizes = [len(hidden) for hidden in self.inputs.hidden]
        total = sum(sizes)
        if total < 2:
            raise DataError("block reconstruction needs at least two calibration samples, one of them held back; there is one")
        count = min(max(1, round(share * total)), total - 1)
        held = torch.zeros(total, dtype=torch.bool)
        held[torch.randperm(total, generator=torch.Generator().manual_seed(_SEED))[:count]] = True
        masks = list(enumerate(held.split(sizes)))
        train = [(batch, (~mask).nonzero()[:, 0]) for batch, mask in masks if not mask.all()]
        return train, [(batch, mask.nonzero()[:, 0]) for batch, mask in masks if mask.any()]

    def error(self, block: nn.Module, form: _Form, step: _Rows) -> tuple[Tensor, Tensor]:
        """Squared error and squared targets, summed over the step's samples, of the block with the form's vectors."""
        batch, rows = step
        hidden, target = self.inputs.hidden[batch], self.targets[batch][rows].to(self.device)
        args, kwargs = _rows_of(self.arguments[batch], len(hidden), rows, self.device)
        hidden = hidden[rows].to(self.device)
        args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        output = functional_call(block, form.vectors, args, kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return (output - target).square().sum(), target.square().sum()

    def loss(self, block: nn.Module, form: _Form, steps: list[_Rows]) -> float:
        """Squared error over squared targets of the block in this form."""
        form.put_layers(block)
        with torch.no_grad():
            sums = torch.tensor([[float(s) for s in self.error(block, form, step)] for step in steps], dtype=torch.float64)
        error, size = sums.sum(dim=0).tolist()
        return error / size if size else error


def _rows_of(value: Any, count: int, rows: Tensor, device: torch.device) -> Any:
    """A block's arguments for some samples of a batch of `count`, on the device.

    A tensor with the batch's size in front (masks, positions) is indexed; one without serves all samples.
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

    def __init__(self, tuned: "_Tuned", options: ReconstructionOptions, train: list[_Rows]) -> None:
        self.tuned = tuned
        self.batch = options.batch
        self.train = train
        self.generator = torch.Generator().manual_seed(_SEED)
        total = options.passes * len(list(self._steps()))
        groups = [{"params": [p], "lr": options.rate * size_of(p)} for p in tuned.parameters]
        # Gradients shrink with the number of weights; Adam's usual 1e-8 would drown those of a large layer.
        self.adam = torch.optim.Adam(groups, eps=1e-15, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda done: (1 + math.cos(math.pi * done / total)) / 2)

    def _steps(self) -> Iterator[_Rows]:
        steps = []
        for batch, rows in self.train:
            shuffled = rows[torch.randperm(len(rows), generator=self.generator)]
            steps += [(batch, piece) for piece in shuffled.split(self.batch)]
        for i in torch.randperm(len(steps), generator=self.generator).tolist():
            yield steps[i]

    def run_pass(self, block: nn.Module, samples: _Samples) -> None:
        """One pass over the samples; it stops early where the loss is not finite."""
        form = self.tuned.form
        form.put_layers(block)
        for step in self._steps():
            with torch.enable_grad():
                error, size = samples.error(block, form, step)
                if not error.isfinite():
                    return
                gradients = torch.autograd.grad(error / size, self.tuned.parameters, materialize_grads=True)
            for parameter, gradient in zip(self.tuned.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.adam.step()
            self.schedule.step()


class _Tuned:
    """A block's compressed layers and vectors as float parameters."""

    def __init__(self, form: _Form, *, moving: bool) -> None:
        trains = EVERYTHING if moving else ~Trains.CODES
        self.layers: dict[str, TunedLinear] = {}
        for name, layer in form.layers.items():
            assert isinstance(layer, CompressedLinear)
            self.layers[name] = TunedLinear(layer, trains)
        vectors = {name: vector.float().clone().requires_grad_() for name, vector in form.vectors.items()}
        self.form = _Form(dict(self.layers), vectors)
        inner = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
        self.parameters = inner + list(vectors.values())

    def stored(self, block_name: str, dtypes: dict[str, torch.dtype]) -> _Form:
        """The block's form with every value rounded as it is stored."""
        layers: dict[str, nn.Module] = {}
        for name, layer in self.layers.items():
            bias = None if layer.bias is None else rounded(layer.bias, dtypes[f"{block_name}.{name}.bias"])
            layers[name] = CompressedLinear.from_parts(layer.stored(), bias)
        vectors = {name: rounded(vector, dtypes[f"{block_name}.{name}"]) for name, vector in self.form.vectors.items()}
        return _Form(layers, vectors)


def _rounded(vector: Tensor, dtype: torch.dtype) -> Tensor:
    return vector.detach().to(dtype, copy=True).float()
