"""`CompressedEmbedding` replaces `nn.Embedding`, and `TiedLinear` a head that is tied to it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.errors import CheckpointError
from slimlm.core.parts.base import Part
from slimlm.core.parts.kernel_layout import MatrixLayout, Refusal
from slimlm.core.parts.pack import EmbeddingEntry, PartEntries, Parts, TensorEntry
from slimlm.runtime.linear import CompressedLinear, Shared, keep_dtypes


class CompressedEmbedding(nn.Module):
    """An embedding whose matrix stays packed; only the rows of the tokens that are looked up are decoded.

    Its buffers are the packed tensors, exactly as stored in a checkpoint; moving the module moves them, casting it changes only
    `activations`, the dtype of its output. Raises CheckpointError for parts whose rows cannot be decoded separately.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        entries: PartEntries,
        packed: dict[str, Tensor],
        activations: torch.dtype,
        *,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        layout = rows_layout(entries)
        if isinstance(layout, Refusal):
            raise CheckpointError(f"an embedding cannot be looked up in what is stored of it: {layout.reason}")
        self.num_embeddings, self.embedding_dim = shape
        _refuse_other_sizes(shape, entries, packed)
        self.entries, self.layout = entries, layout
        self.activations = activations
        self.factor = factor
        """The factor of the rows that are looked up, in the dtype of the activations (Gemma's embed_scale)."""
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        self.packed_names = tuple(packed)

    @classmethod
    def from_part(cls, part: Part, activations: torch.dtype, *, factor: float = 1.0) -> "CompressedEmbedding":
        """An embedding of this matrix `[tokens, width]`."""
        parts = Parts(part)
        return cls(parts.shape, parts.describe(), parts.tensors(), activations, factor=factor)

    @classmethod
    def empty(cls, entry: EmbeddingEntry, activations: torch.dtype) -> "CompressedEmbedding":
        """An embedding on the meta device for a checkpoint's tensors to be loaded into; `entry` is `self.describe()`."""
        return cls(entry.shape, entry.parts, entry.empty_tensors(), activations, factor=entry.factor)

    def describe(self) -> EmbeddingEntry:
        """The entry of this embedding in a checkpoint's config."""
        return EmbeddingEntry(
            shape=(self.num_embeddings, self.embedding_dim),
            factor=self.factor,
            parts=self.entries,
            tensors={name: TensorEntry.of(tensor) for name, tensor in self.packed().items()},
        )

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    def parts(self) -> Parts:
        """The matrix `[tokens, width]` as a part, unpacked."""
        return self.entries.from_stored(self.packed(), (self.num_embeddings, self.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows `[..., width]` of tokens `[...]`."""
        bits, chosen, packed = self.layout.bits, ids.flatten(), self.packed()
        stored = packed["weight"].view(self.num_embeddings, -1).index_select(0, chosen)
        codes = stored if bits == 8 else bitstream.unpack(stored, bits, self.embedding_dim)
        signed = (codes - 2 ** (bits - 1)).view(torch.int8)
        scale = packed["weight_scale"].index_select(0, chosen)
        rows = grid.dense(signed, scale, self.layout.group_size).to(self.activations)
        if self.factor != 1:
            rows *= torch.tensor(self.factor, dtype=self.activations, device=rows.device)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.entries.summary()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedEmbedding":
        before = self.packed()
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        # No weight has a floating-point dtype that a cast would change, so an empty tensor shows the new dtype.
        self.activations = fn(torch.empty(0, dtype=self.activations)).dtype
        return self


class TiedLinear(Shared, CompressedLinear):
    """A linear layer whose weight is the matrix of a packed embedding; its own tensor is the bias, if there is one.

    When the embedding's tensors are replaced or moved, this layer uses the new ones.
    """

    def __init__(self, embedding: CompressedEmbedding, bias: Tensor | None) -> None:
        super().__init__((embedding.num_embeddings, embedding.embedding_dim), embedding.entries, {}, bias)
        # In a tuple, so that the embedding does not become a part of this module.
        self._owner = (embedding,)

    @property
    def embedding(self) -> CompressedEmbedding:
        """The embedding that holds the matrix."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:
        """The embedding's packed elements, under the name that they have in every linear layer."""
        return self.packed()["weight"]

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return self.embedding.packed()

    def sources(self) -> Sequence[Tensor]:
        """The tensors that are packed for kernels."""
        return list(self.packed().values())


def rows_layout(entries: PartEntries) -> MatrixLayout | Refusal:
    """The layout of parts whose rows can be decoded separately, or why they cannot."""
    layout = entries.base.kernel_layout()
    if entries.added or not isinstance(layout, MatrixLayout) or layout.elements != "integers" or layout.mask is not None:
        return Refusal(f"it is one part of integer codes without a mask, not {entries.summary()}")
    if layout.group_size == "per-tensor" or layout.channel_scale or layout.zero:
        return Refusal("its scales are one per row or group, and none per input, without zeros")
    return layout


def _refuse_other_sizes(shape: tuple[int, int], entries: PartEntries, packed: dict[str, Tensor]) -> None:
    """Raise CheckpointError where stored tensors do not have the sizes of a matrix of this shape."""
    expected = entries.expected(shape)
    for name, tensor in packed.items():
        if name not in expected or not expected[name].fits(tuple(tensor.shape)):
            size = expected[name].summary() if name in expected else "not stored"
            raise CheckpointError(
                f"a stored {name} has the shape {list(tensor.shape)}; of an embedding of {shape[0]} x {shape[1]} "
                f"({entries.summary()}) it is {size}"
            )
