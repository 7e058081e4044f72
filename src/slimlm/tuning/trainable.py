"""The trained values of a block: those of its compressed layers' parts, and its vectors."""

import torch
from torch import Tensor, nn

from slimlm.core.parts.base import Part
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.trainable import Frozen, Trainable, Trains
from slimlm.models.structure import LINEAR_KINDS
from slimlm.runtime.linear import CompressedLinear


class TunedLinear(nn.Module):
    """A compressed layer with trainable parts, in its place while it is tuned."""

    def __init__(self, layer: CompressedLinear, trains: Trains) -> None:
        """Make it of a layer, of which these kinds of values are trained."""
        super().__init__()
        self.slots = {slot: _trainable(part, trains) for slot, part in layer.parts().filled()}
        self.parts = nn.ModuleDict(self.slots)
        bias = layer.bias
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=Trains.BIASES in trains)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias for x `[..., in]`."""
        first, *added = self.slots.values()
        weight = first.dense()
        for part in added:
            weight = weight + part.dense()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def stored(self) -> Parts:
        """The parts in their stored form."""
        return Parts(**{slot: part.part() for slot, part in self.slots.items()})


def _trainable(part: Part, trains: Trains) -> Trainable:
    return part.trainable(trains) if part.describe().trains & trains else Frozen(part)


def vectors_of(block: nn.Module) -> list[str]:
    """The names of the parameters of one dimension of a block that are no biases of linear layers: norms, mostly."""
    linears = {name for name, module in block.named_modules() if isinstance(module, (*LINEAR_KINDS, CompressedLinear))}
    parameters = block.named_parameters()
    return [name for name, own in parameters if own.ndim == 1 and name.rpartition(".")[0] not in linears]


def size_of(tensor: Tensor) -> float:
    """Root mean square of the elements `[...]` that are not zero; 0 for a tensor of zeros, which is then not tuned."""
    return float(tensor.detach().square().sum() / max(1, int(tensor.count_nonzero()))) ** 0.5


def rounded(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector `[n]` in float32, its values rounded to those of a dtype."""
    return vector.detach().to(dtype, copy=True).float()
