"""`nn.Linear` goes in, `CompressedLinear` comes out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn

from slimlm.core.parts.pack import LayerEntry, PartEntries, Parts, TensorEntry
from slimlm.runtime.backends import Stored, cpu
from slimlm.runtime.dispatch import Choice, Kernels, choose, passed_over


class Multiplier(nn.Module):
    """A layer for whose products somebody is chosen, at the first of them or by `use_kernels`."""

    in_features: int
    out_features: int
    kernels: Kernels = "reference"
    """who was asked for"""
    _choice: Choice | None = None
    _prepared: Any = None
    _blob: Tensor | None = None
    """what the kernels packed the stored tensors into, once they did"""
    preparations: int = 0
    """how often it was repacked: with another number what was prepared lies elsewhere"""

    def stored(self) -> Stored:
        """The parts as they are stored, for a backend to prepare."""
        raise NotImplementedError

    def use_kernels(self, kernels: Kernels) -> Choice:
        """Choose who multiplies from now on; raises KernelError where kernels asked for by name do not take this layer."""
        choice = choose(self.stored(), kernels)
        self.kernels, self._choice, self._prepared = kernels, choice, None
        return choice

    def pass_kernels_over(self, reason: str) -> None:
        """Let the reference multiply for this reason, until somebody is chosen anew."""
        self._choice, self._prepared = passed_over(reason), None

    def choice(self) -> Choice:
        """Who multiplies."""
        return self._choice or self.use_kernels(self.kernels)

    def prepare(self) -> Any:
        """Repack for the chosen backend now, if that was not done yet, rather than at the first product."""
        if self._prepared is None:
            self._prepared = self.choice().backend.prepare(self.stored())
            self.preparations += 1
            if isinstance(self._prepared, cpu.Prepared):
                self._blob = self._prepared.blob
        return self._prepared

    def prepared(self) -> Any:
        """What was repacked; None: nothing yet."""
        return self._prepared

    def adopt(self, blob: Tensor) -> None:
        """Take what the kernels packed this layer's stored tensors into before; it may be a view of a file."""
        self._blob, self._prepared = blob, None

    def forget(self) -> None:
        """Choose and repack anew, because the stored tensors are others or elsewhere."""
        self._choice = self._prepared = self._blob = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy repacks for itself: what is prepared holds addresses."""
        return {**self.__dict__, "_choice": None, "_prepared": None, "_blob": None}


class CompressedLinear(Multiplier):
    """A linear layer whose weight is a sum of packed parts.

    Its buffers are the packed tensors, exactly as stored in a checkpoint; moving the module moves them, casting it never
    changes them (only the bias follows a cast). Who multiplies is chosen at the first product, or by `use_kernels`.
    """

    def __init__(self, shape: tuple[int, int], entries: PartEntries, packed: dict[str, Tensor], bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.entries = entries
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        self.packed_names = tuple(packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._works_on: torch.device | None = None

    @classmethod
    def from_parts(cls, parts: Parts, bias: Tensor | None) -> "CompressedLinear":
        """A layer of these parts; the bias `[out]` is kept as it is."""
        # A module's buffers may come to be part of a gradient; what steps made may not (see `slimlm.recipe.apply_steps`).
        packed = {name: t.clone() if t.is_inference() else t for name, t in parts.tensors().items()}
        return cls(parts.shape, parts.describe(), packed, bias)

    @classmethod
    def empty(cls, entry: LayerEntry) -> "CompressedLinear":
        """A layer on the meta device for a checkpoint's tensors to be loaded into; `entry` is `self.describe()`."""
        bias = torch.empty(entry.shape[0], device="meta") if entry.bias else None
        return cls(entry.shape, entry.parts, entry.empty_tensors(), bias)

    def describe(self) -> LayerEntry:
        """What a checkpoint's config says of this layer."""
        return LayerEntry(
            shape=(self.out_features, self.in_features),
            bias=self.bias is not None,
            parts=self.entries,
            tensors={name: TensorEntry.of(tensor) for name, tensor in self.packed().items()},
        )

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    def parts(self) -> Parts:
        """The parts, unpacked."""
        return self.stored().parts()

    def stored(self) -> Stored:
        """The parts as they are stored, for a backend to prepare."""
        shape = self.out_features, self.in_features
        return Stored(shape, self.entries, self.packed(), self.bias, self._blob, self._works_on)

    def rest(self, elsewhere: dict[str, Tensor]) -> None:
        """Let the stored tensors be these equal ones on the CPU, and the layer go on where it is, as it is prepared.

        So a card holds the kernels' layout alone. Saving reads the tensors where they rest; a move to another device ends it.
        """
        self._works_on = self.stored().device
        for name in self.packed_names:
            setattr(self, name, elsewhere[name])

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias for x `[..., in]`, in the dtype of x."""
        prepared = self._prepared
        if prepared is None:
            prepared = self.prepare()
        assert self._choice is not None
        return self._choice.backend.matmul(x, prepared)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.entries.summary()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, choice, blob = self.packed(), self._choice, self._blob
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        self.forget()
        if self._works_on is not None:
            if fn(torch.empty(0, dtype=torch.uint8, device=self._works_on)).device == self._works_on:
                # A cast, or a move to where it is: what rests goes on resting.
                for name, tensor in before.items():
                    setattr(self, name, tensor)
                self._choice = choice
            else:
                self._works_on = None
            return self
        if all(
            now.device == old.device and now.data_ptr() == old.data_ptr()
            for now, old in zip(self.packed().values(), before.values(), strict=True)
        ):
            # A cast, or a move to where it is: the kernels' bytes still stand for the stored tensors; the bias may be another.
            self._choice, self._blob = choice, blob
        return self


class Shared(Multiplier):
    """A layer whose stored tensors are another module's, too, which may move, cast, replace or write to them.

    The layer is not told of that, so it looks at every use whether they are still what it was chosen and packed for. (A
    compiled graph does not look.)
    """

    _made_of: "tuple[Source, ...]" = ()
    """what the choice and the kernels' bytes are of"""

    def sources(self) -> Sequence[Tensor]:
        """The tensors that are packed for kernels."""
        raise NotImplementedError

    def choice(self) -> Choice:
        """Who multiplies."""
        self._follow()
        return super().choice()

    def prepare(self) -> Any:
        """Repack for the chosen backend now, if that was not done yet, rather than at the first product."""
        self._follow()
        return super().prepare()

    def stored(self) -> Stored:
        """The parts as they are stored, for a backend to prepare."""
        self._follow()
        return super().stored()

    def adopt(self, blob: Tensor) -> None:
        """Take what the kernels packed this layer's stored tensors into before; it may be a view of a file."""
        self._follow()
        super().adopt(blob)

    def _follow(self) -> None:
        """Forget what was made of tensors that are others now."""
        if torch.compiler.is_compiling():
            return
        now = self.sources()
        if len(now) != len(self._made_of) or not all(old.stands_for(t) for old, t in zip(self._made_of, now, strict=True)):
            self.forget()
            self._made_of = tuple(Source.of(tensor) for tensor in now)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, fn, recurse)
        # The bias may be another; what became of the stored tensors is seen at the next use.
        self._prepared = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_made_of": ()}


@dataclass(frozen=True)
class Source:
    """A tensor as it was when something was made of it."""

    tensor: ref[Tensor]
    dtype: torch.dtype
    device: torch.device
    address: int
    writes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Source":
        return cls(ref(tensor), tensor.dtype, tensor.device, tensor.data_ptr(), _writes(tensor))

    def is_still(self, now: Tensor) -> bool:
        """Whether a tensor is this one, as it was and where it lay."""
        return self.stands_for(now) and self.dtype == now.dtype

    def stands_for(self, now: Tensor) -> bool:
        """Whether a tensor holds what this one held: nothing was written, and it lies where it lay or was only widened."""
        if self.tensor() is not now or self.device != now.device or self.writes != _writes(now):
            return False
        if self.dtype == now.dtype:
            return self.address == now.data_ptr()
        return torch.promote_types(now.dtype, self.dtype) == now.dtype


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written to; one that was made in inference mode does not count that."""
    return 0 if tensor.is_inference() else tensor._version


def keep_dtypes(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Undo what a cast did to a module's packed tensors, which were these: they follow a move only."""
    for name, old in before.items():
        new = getattr(module, name)
        if new.dtype != old.dtype:
            setattr(module, name, old.to(new.device))
