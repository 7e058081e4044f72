"""One linear layer between two steps: what was decided so far, and what a step may still decide."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.parts.base import Part
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import pruned

_LARGEST = 1e15
"""The largest weight of a matrix that is worked on: the sum of the squares of some millions of these is finite in float32."""


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds no NaN or infinity, and a matrix no weight whose square float32 cannot hold.

    Args:
        name: of the tensor, for the message.
        tensor: of any shape, such as `[out, in]`.

    Raises:
        NumericsError: it does; the message has its name and a count, or the weight.
    """
    if not tensor.numel():
        return
    # The extremes include NaN and infinity, and take a sixtieth of the time of a test of every 16-bit weight.
    least, most = (float(extreme) for extreme in tensor.aminmax())
    if not (math.isfinite(least) and math.isfinite(most)):
        bad = int((~tensor.isfinite()).sum())
        raise NumericsError(
            f"{name} holds {bad} NaN or infinite weights of {tensor.numel()}; the model file is damaged or was "
            "saved in a dtype too narrow for it. Nothing was written; give a model without such weights"
        )
    if tensor.ndim == 2 and max(-least, most) > _LARGEST:
        raise NumericsError(
            f"{name} holds a weight of {most if most > -least else least:.3g}; float32 cannot hold the square of such weights, "
            f"which errors are computed of, and trained weights are far below {_LARGEST:g}. The model file is damaged, or the "
            "training diverged. Nothing was written; give a model without such weights"
        )


@dataclass(frozen=True)
class Layer:
    """The state of one weight between two steps. Steps return a new one; no tensor is changed in place.

    The weight becomes base + outliers + adapter, of which steps decide one after another. All matrices are float32 `[out, in]`:

        original         the model's weight
        reference        what the parts should add up to: the original, unless a step puts something else in its place
        base_reference   what the base should stand for, every weight: the reference less outliers and adapter
        masked_reference the same, zero where the mask drops a weight: what a quantizer rounds
        base_weight      what the base stands for as decided so far, zero where the mask drops a weight
        residual         the reference less base and outliers: what an adapter should stand for
        error            the original less all parts
    """

    name: str
    original: Tensor
    """float32 `[out, in]`; no step changes it"""
    reference: Tensor
    """float32 `[out, in]`"""
    dtype: torch.dtype
    """what the model stores the weight in"""
    mask: Tensor | None = None
    """bool `[out, in]`; True stays"""
    pattern: str = ""
    """of the mask: "2:4", or the share of each row that was dropped, as text"""
    base: Part | None = None
    """codes or values without their mask; None: not decided yet"""
    outliers: Part | None = None
    adapter: Part | None = None
    updated_weight: Tensor | None = None
    """float32 `[out, in]`: in place of the base's reference, where a pruner has changed the weights that stay and nothing has
    coded them yet"""
    notes: tuple[str, ...] = ()
    """for the user, on how this layer was decided, such as a stronger damping"""

    @classmethod
    def of(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "Layer":
        """A layer of which nothing is decided yet.

        Args:
            name: of the layer in the model.
            weight: `[out, in]`.
            dtype: what the model stores the weight in; by default the weight's.

        Raises:
            NumericsError: the weight holds NaN or infinity.
        """
        refuse_not_finite(name, weight)
        original = weight.detach().float()
        return cls(name, original, original, dtype or weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""
        return self.original.shape[0], self.original.shape[1]

    @property
    def base_reference(self) -> Tensor:
        """What the base should stand for, before the mask: the reference less outliers and adapter, or the updated weight."""
        return self._less_added(self.reference) if self.updated_weight is None else self.updated_weight

    @property
    def masked_reference(self) -> Tensor:
        """What the base should stand for, zero where the mask drops a weight."""
        return self._masked(self.base_reference)

    @property
    def base_weight(self) -> Tensor:
        """What the base stands for as decided so far, or should stand for; zero where the mask drops a weight."""
        return self.masked_reference if self.base is None else self._masked(self.base.dense())

    @property
    def residual(self) -> Tensor:
        """The reference less base and outliers: what an adapter should stand for."""
        residual = self.reference - self.base_weight
        return residual if self.outliers is None else residual - self.outliers.dense()

    @property
    def error(self) -> Tensor:
        """The original less what all parts stand for."""
        return self._less_added(self.original - self.base_weight)

    def _masked(self, weight: Tensor) -> Tensor:
        return weight if self.mask is None else weight * self.mask

    def _less_added(self, weight: Tensor) -> Tensor:
        for part in (self.outliers, self.adapter):
            if part is not None:
                weight = weight - part.dense()
        return weight

    def with_mask(self, mask: Tensor, pattern: str) -> "Layer":
        """The layer with a mask.

        Args:
            mask: bool `[out, in]`; True stays.
            pattern: of the mask, as in the field.

        Raises:
            RecipeError: there is a mask already.
        """
        if self.mask is not None:
            raise RecipeError(f"{self.name} would be pruned twice; a recipe has one prune step")
        return replace(self, mask=mask, pattern=pattern)

    def with_updated_weight(self, weight: Tensor) -> "Layer":
        """The layer with this weight `[out, in]`, zero where pruned, as the reference of the base until something codes it."""
        return replace(self, updated_weight=weight, base=None)

    def with_base(self, base: Part) -> "Layer":
        """The layer with this base, in place of an earlier one."""
        return replace(self, base=base, updated_weight=None)

    def with_outliers(self, outliers: Part) -> "Layer":
        """The layer with these outliers, in place of earlier ones."""
        return replace(self, outliers=outliers)

    def with_adapter(self, adapter: Part) -> "Layer":
        """The layer with this adapter, in place of an earlier one: a later adapter is a refit."""
        return replace(self, adapter=adapter)

    def with_notes(self, *texts: str) -> "Layer":
        """The layer with more notes for the user."""
        return replace(self, notes=(*self.notes, *texts))

    def parts(self) -> Parts:
        """The decided parts. A base that nothing has coded is stored in the weight's dtype.

        Raises:
            RecipeError: there is a mask, and the base is of a kind that cannot be stored under one.
        """
        base = self.base if self.base is not None else Plain(self.masked_reference.to(self.dtype))
        first: Part = base if self.mask is None else pruned(base, self.mask, self.pattern)
        return Parts(first, adapter=self.adapter, outliers=self.outliers)
