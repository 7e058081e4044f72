"""`nn.Embedding` goes in, `CompressedEmbedding` comes out; of a head that is tied to it, `TiedLinear`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.errors import CheckpointError
from slimlm.core.parts import Description, Part, Uniform, pack_parts, unpack_parts
from slimlm.runtime.linear import CompressedLinear, Shared, about_tensors, empty_tensors, keep_dtypes


class CompressedEmbedding(nn.Module):
    """An embedding whose matrix stays packed: of the tokens asked for, and of no others, the rows are decoded.

    Its buffers are the packed tensors, exactly as stored in a checkpoint; moving the module moves them, casting it changes
    `activations` only, the dtype of what it gives. Raises CheckpointError for parts of which no row can be decoded by itself.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        descriptions: list[Description],
        packed: dict[str, Tensor],
        activations: torch.dtype,
        *,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        if (reason := unfit(descriptions)) is not None:
            raise CheckpointError(f"an embedding cannot be looked up in what is stored of it: {reason}")
        self.num_embeddings, self.embedding_dim = shape
        _refuse_other_sizes(shape, descriptions[0], packed)
        self.descriptions = descriptions
        self.activations = activations
        self.factor = factor
        """by which what was looked up is multiplied, in the dtype of the activations (Gemma's embed_scale)"""
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        self.packed_names = tuple(packed)

    @classmethod
    def from_part(cls, part: Uniform, activations: torch.dtype, *, factor: float = 1.0) -> "CompressedEmbedding":
        """An embedding of this matrix `[tokens, width]`."""
        return cls(part.shape, [part.describe()], pack_parts((part,)), activations, factor=factor)

    @classmethod
    def empty(cls, about: dict[str, Any], activations: torch.dtype) -> "CompressedEmbedding":
        """An embedding on the meta device for a checkpoint's tensors to be loaded into; `about` is `self.about()`."""
        shape = about["shape"][0], about["shape"][1]
        return cls(shape, about["parts"], empty_tensors(about["tensors"]), activations, factor=about["factor"])

    def about(self) -> dict[str, Any]:
        """What a checkpoint's config says of this embedding."""
        return {
            "shape": [self.num_embeddings, self.embedding_dim],
            "factor": self.factor,
            "parts": self.descriptions,
            "tensors": about_tensors(self.packed()),
        }

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    def parts(self) -> tuple[Part, ...]:
        """The matrix `[tokens, width]` as the one part that it is, unpacked."""
        return unpack_parts(self.descriptions, self.packed(), (self.num_embeddings, self.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows `[..., width]` of these tokens."""
        [about] = self.descriptions
        bits, chosen, packed = about["bits"], ids.flatten(), self.packed()
        stored = packed["weight"].view(self.num_embeddings, -1).index_select(0, chosen)
        codes = stored if bits == 8 else bitstream.unpack(stored, bits, self.embedding_dim)
        signed = (codes - 2 ** (bits - 1)).view(torch.int8)
        rows = grid.dense(signed, packed["weight_scale"].index_select(0, chosen), about["group_size"]).to(self.activations)
        if self.factor != 1:
            rows *= torch.tensor(self.factor, dtype=self.activations, device=rows.device)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        [about] = self.descriptions
        return f"{self.num_embeddings}, {self.embedding_dim}, {about['bits']}-bit"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedEmbedding":
        before = self.packed()
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        # There is no floating-point weight whose dtype a cast would change, so one is made up.
        self.activations = fn(torch.empty(0, dtype=self.activations)).dtype
        return self


class TiedLinear(Shared, CompressedLinear):
    """A linear layer whose weight is the matrix of a packed embedding, which holds and stores it: here is the bias at most.

    Other tensors in the embedding, and another place, are this layer's, too.
    """

    def __init__(self, embedding: CompressedEmbedding, bias: Tensor | None) -> None:
        super().__init__((embedding.num_embeddings, embedding.embedding_dim), embedding.descriptions, {}, bias)
        # In a tuple, so that the embedding does not become a part of this module.
        self._owner = (embedding,)

    @property
    def embedding(self) -> CompressedEmbedding:
        """Whose matrix it is."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's packed elements, under the name that every linear layer has them."""
        return self.packed()["weight"]

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return self.embedding.packed()

    def sources(self) -> Sequence[Tensor]:
        """The tensors that are packed for kernels."""
        return list(self.packed().values())

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias for x `[..., in]`, in the dtype of x."""
        self._check_sources()
        return super().forward(x)


def unfit(descriptions: Sequence[Description]) -> str | None:
    """Why no row of parts that are so described can be decoded by itself, in words; None: it can."""
    if len(descriptions) != 1 or descriptions[0].get("kind") != "uniform":
        return f"it is one uniform part, not {' + '.join(str(about.get('kind')) for about in descriptions) or 'nothing'}"
    if descriptions[0]["group_size"] == "per-tensor" or descriptions[0]["input_scale"]:
        return "its scales are one per row or group, and none per input"
    return None


def _refuse_other_sizes(shape: tuple[int, int], about: Description, packed: dict[str, Tensor]) -> None:
    """Raise CheckpointError where stored tensors are not as large as a matrix of this shape asks for."""
    expected = {
        "weight": (shape[0] * bitstream.packed_bytes(shape[1], about["bits"]),),
        "weight_scale": grid.scale_shape(shape, about["group_size"]),
    }
    for name, tensor in packed.items():
        if (found := tuple(tensor.shape)) != (size := expected.get(name)):
            raise CheckpointError(
                f"a stored {name} has the shape {found}; of an embedding of {shape[0]} x {shape[1]} in {about['bits']} bits "
                f"it is {size}"
            )
