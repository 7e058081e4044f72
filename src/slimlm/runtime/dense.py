"""Dense layers whose weights stay in the 16 bits that they are stored in, with float32 activations.

Layers that are not compressed (embeddings, lm_head, layers that a recipe ignores) are mostly stored in bfloat16 or float16.
Widened to float32 they take twice the memory; in 16 bits torch multiplies by them slowly at few rows and rounds every
activation. Here weights stay as they are stored and activations are float32: an embedding widens the rows that it looks up, a
linear layer multiplies few rows by the CPU kernels, and for many rows it widens a slice of its weight at a time.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.runtime.backends import Stored
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import PackedLayer, Shared

NARROW = (torch.bfloat16, torch.float16)
_FEW = 32
"""The most rows of activations at which the kernels are faster than widening the weight for a product by torch."""
_SLICE = 2**22
"""The number of weights that are widened at a time."""


class DenseLinear(Shared, nn.Linear):
    """A linear layer whose activations may be of another dtype than its weight."""

    @classmethod
    def around(cls, linear: nn.Linear) -> "DenseLinear":
        """The same layer, with the same parameters."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def sources(self) -> Sequence[Tensor]:
        """The weight `[out, in]`, which may be an embedding's, too."""
        return (self.weight,)

    def stored(self) -> Stored:
        """The weight as the one part that it is."""
        self._check_sources()
        parts = Parts(Plain(self.weight.detach()))
        return Stored(parts.shape, parts.describe(), parts.tensors(), self.bias, self._blob)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias for x `[..., in]`, in the dtype of x."""
        few = x.numel() <= _FEW * self.in_features
        # The kernels use a packed copy, which training would not change.
        if few and not self.weight.requires_grad and self.selection().backend.name == "cpu":
            backend, prepared = self.ready()
            return backend.matmul(x, prepared)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, bias)
        slices = self.weight.split(max(1, _SLICE // self.in_features))
        y = torch.cat([F.linear(x, part.to(x.dtype)) for part in slices], dim=-1)
        return y if bias is None else y + bias


class WideEmbedding(nn.Embedding):
    """An embedding that casts the rows that it looks up; `activations` is the dtype of its output."""

    activations: torch.dtype

    @classmethod
    def around(cls, embedding: nn.Embedding, activations: torch.dtype) -> "WideEmbedding":
        """The same embedding, with the same parameter."""
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer.weight, layer.activations = embedding.weight, activations
        return layer.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows `[..., width]` of tokens `[...]`."""
        return F.embedding(ids, self.weight).to(self.activations)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideEmbedding":
        before = self.weight.dtype
        super()._apply(fn, recurse)
        if self.weight.dtype != before:
            self.activations = self.weight.dtype
        return self


def widen_activations(model: nn.Module) -> None:
    """Make a model compute in float32 without widening its embeddings and linear layers; other parameters are cast.

    Only plain `nn.Embedding` and `nn.Linear` stay in 16 bits; packed tensors do not change. Tied parameters stay tied, so one
    that another kind of module shares is cast.
    """
    kinds = (nn.Embedding, nn.Linear)
    modules = dict(model.named_modules())
    own = (*kinds, DenseLinear, WideEmbedding)
    shared = {id(p) for m in modules.values() if type(m) not in own for p in m.parameters(recurse=False)}
    for name, module in modules.items():
        if type(module) in kinds and module.weight.dtype in NARROW and id(module.weight) not in shared:
            if isinstance(module, nn.Linear):
                model.set_submodule(name, DenseLinear.around(module))
            elif module.max_norm is None:
                model.set_submodule(name, WideEmbedding.around(module, torch.float32))
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, CompressedEmbedding):
            module.activations = torch.float32
        if isinstance(module, PackedLayer | WideEmbedding | CompressedEmbedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in NARROW:
                wide = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
                setattr(module, key, cast.setdefault(id(parameter), wide))
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in NARROW:
                setattr(module, key, buffer.float())
