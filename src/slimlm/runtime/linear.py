"""`CompressedLinear`, which replaces `nn.Linear`, and what it shares with other layers that have a backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn

from slimlm.core.parts.pack import LayerEntry, PartEntries, Parts, TensorEntry
from slimlm.core.profiling import profiled
from slimlm.runtime.backends import Backend, Stored, cpu
from slimlm.runtime.dispatch import Selection, reference_because, select_backend
from slimlm.runtime.kernel_names import Kernels

Ready = tuple[Backend, Any]
"""A backend, and a layer as it packed it."""
_CHANGING = RLock()
"""Held while a layer's backend is selected or its tensors are packed, so that no thread sees half of it."""


class PackedLayer(nn.Module):
    """A linear layer with a backend, which is selected at the first product or by `use_kernels`."""

    in_features: int
    out_features: int
    kernels: Kernels = "reference"
    """The kernels that were asked for."""
    _selection: Selection | None = None
    _ready: Ready | None = None
    """The backend and the layer as it packed it; one value, so that a thread that multiplies meanwhile sees both or neither."""
    _bias_source: "Source | None" = None
    """The bias with which the layer was prepared, of which backends hold a copy."""
    _blob: Tensor | None = None
    """The stored tensors as packed by the CPU kernels; None: they are not packed yet."""
    preparations: int = 0
    """The number of times that the layer was prepared; a graph captured at another number would read freed memory."""

    def stored(self) -> Stored:
        """The parts as they are stored, for a backend to prepare."""
        raise NotImplementedError

    def use_kernels(self, kernels: Kernels) -> Selection:
        """Select the backend again and return the selection.

        Raises:
            KernelError: kernels that were asked for by name do not take this layer.
        """
        with _CHANGING:
            selection = select_backend(self.stored(), kernels)
            self.kernels, self._selection, self._ready = kernels, selection, None
        return selection

    def use_reference(self, reason: str) -> None:
        """Use the reference until the next selection, for a reason that is reported to the user."""
        with _CHANGING:
            self._selection, self._ready = reference_because(reason), None

    def selection(self) -> Selection:
        """The selected backend."""
        return self._selection or self.use_kernels(self.kernels)

    @profiled("unpacking")
    def prepare(self) -> Any:
        """Repack for the selected backend now, unless that is done, rather than at the first product."""
        with _CHANGING:
            if self._ready is None:
                self._note_bias()
                backend = self.selection().backend
                prepared = backend.prepare(self.stored())
                self._ready = backend, prepared
                self.preparations += 1
                if isinstance(prepared, cpu.PreparedOnCpu):
                    self._blob = prepared.blob
            elif not self._has_bias_of_before():
                backend, prepared = self._ready
                self._ready = backend, backend.with_bias(prepared, self._note_bias())
            return self._ready[1]

    def ready(self) -> Ready:
        """The selected backend and the layer as it packs it, which happens now unless it is done."""
        ready = self._ready
        while ready is None or not self._has_bias_of_before():
            self.prepare()
            # None where another thread dropped it meanwhile.
            ready = self._ready
        return ready

    def _own_bias(self) -> Tensor | None:
        bias = self.bias
        return bias if isinstance(bias, Tensor) else None

    def _note_bias(self) -> Tensor | None:
        """The bias `[out]` with which the layer is prepared now."""
        bias = self._own_bias()
        self._bias_source = None if bias is None else Source.of(bias)
        return bias

    def _has_bias_of_before(self) -> bool:
        """Whether the bias is the one with which the layer was prepared, not written to; a compiled graph does not check."""
        if torch.compiler.is_compiling():
            return True
        bias = self._own_bias()
        if bias is None or self._bias_source is None:
            return bias is None and self._bias_source is None
        return self._bias_source.is_still(bias)

    def prepared(self) -> Any:
        """The layer as its backend packed it; None: it is not packed yet."""
        return None if self._ready is None else self._ready[1]

    def adopt(self, blob: Tensor) -> None:
        """Use bytes that the CPU kernels packed this layer's stored tensors into earlier.

        Args:
            blob: uint8 `[bytes]`; may be a view of a file.
        """
        with _CHANGING:
            self._blob, self._ready = blob, None

    def forget(self) -> None:
        """Drop the selection and what was repacked, because the stored tensors changed or moved."""
        with _CHANGING:
            self._selection = self._ready = self._blob = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """The state without packed data, which hold addresses: a copy packs again."""
        return {**self.__dict__, "_selection": None, "_ready": None, "_bias_source": None, "_blob": None}


class CompressedLinear(PackedLayer):
    """A linear layer whose weight is a sum of packed parts.

    Its buffers are the packed tensors, exactly as stored in a checkpoint; moving the module moves them, casting it never
    changes them (only the bias follows a cast).
    """

    def __init__(self, shape: tuple[int, int], entries: PartEntries, packed: dict[str, Tensor], bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = shape
        self.entries = entries
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)
        self.packed_names = tuple(packed)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._compute_device: torch.device | None = None

    @classmethod
    @profiled("packing")
    def from_parts(cls, parts: Parts, bias: Tensor | None) -> "CompressedLinear":
        """A layer of these parts; the bias `[out]` is kept as it is."""
        # A module's buffers may be part of a gradient, inference tensors may not (see `slimlm.recipe.apply_steps`).
        packed = {name: t.clone() if t.is_inference() else t for name, t in parts.tensors().items()}
        return cls(parts.shape, parts.describe(), packed, bias)

    @classmethod
    def empty(cls, entry: LayerEntry) -> "CompressedLinear":
        """A layer on the meta device for a checkpoint's tensors to be loaded into; `entry` is `self.describe()`."""
        bias = torch.empty(entry.shape[0], device="meta") if entry.bias else None
        return cls(entry.shape, entry.parts, entry.empty_tensors(), bias)

    def describe(self) -> LayerEntry:
        """The entry of this layer in a checkpoint's config."""
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
        return Stored(shape, self.entries, self.packed(), self.bias, self._blob, self._compute_device)

    def offload(self, tensors: dict[str, Tensor]) -> None:
        """Move the stored tensors to the CPU, while products still run on this device with the packed layer.

        A GPU then holds only the kernels' layout. Saving reads the tensors from the CPU; a move to another device ends this.

        Args:
            tensors: copies of the stored tensors `[...]` on the CPU, by name.
        """
        self._compute_device = self.stored().device
        for name in self.packed_names:
            setattr(self, name, tensors[name])

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias for x `[..., in]`, in the dtype of x."""
        backend, prepared = self.ready()
        return backend.matmul(x, prepared)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.entries.summary()}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before, selection, blob = self.packed(), self._selection, self._blob
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        self.forget()
        if self._compute_device is not None:
            if fn(torch.empty(0, dtype=torch.uint8, device=self._compute_device)).device == self._compute_device:
                # A cast, or a move to the same device: the stored tensors stay on the CPU.
                for name, tensor in before.items():
                    setattr(self, name, tensor)
                self._selection = selection
            else:
                self._compute_device = None
            return self
        if all(
            now.device == old.device and now.data_ptr() == old.data_ptr()
            for now, old in zip(self.packed().values(), before.values(), strict=True)
        ):
            # A cast, or a move to the same device: the packed bytes are still valid; the bias may have changed.
            self._selection, self._blob = selection, blob
        return self


class Shared(PackedLayer):
    """A layer that shares its stored tensors with another module, which may move, cast, replace or write to them.

    The layer is not notified of that, so it checks at every use whether they are still the tensors for which its backend was
    selected and prepared. (A compiled graph does not check.)
    """

    _made_of: "tuple[Source, ...]" = ()
    """The tensors that the selection and the packed bytes were made from."""

    def sources(self) -> Sequence[Tensor]:
        """The tensors that are packed for kernels."""
        raise NotImplementedError

    def selection(self) -> Selection:
        """The selected backend."""
        self._check_sources()
        return super().selection()

    def prepare(self) -> Any:
        """Repack for the selected backend now, unless that is done, rather than at the first product."""
        self._check_sources()
        return super().prepare()

    def ready(self) -> Ready:
        """The selected backend and the layer as it packs it, which happens now unless it is done."""
        self._check_sources()
        return super().ready()

    def stored(self) -> Stored:
        """The parts as they are stored, for a backend to prepare."""
        self._check_sources()
        return super().stored()

    def adopt(self, blob: Tensor) -> None:
        """Use bytes, uint8 `[bytes]`, that the CPU kernels packed this layer's stored tensors into earlier."""
        self._check_sources()
        super().adopt(blob)

    def _check_sources(self) -> None:
        """Drop the selection and packed data where the tensors have changed since."""
        if torch.compiler.is_compiling():
            return
        now = self.sources()
        if len(now) != len(self._made_of) or not all(old.stands_for(t) for old, t in zip(self._made_of, now, strict=True)):
            self.forget()
            self._made_of = tuple(Source.of(tensor) for tensor in now)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        nn.Module._apply(self, fn, recurse)
        # The bias may have changed; the stored tensors are checked at the next use.
        self._ready = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_made_of": ()}


@dataclass(frozen=True)
class Source:
    """The state of a tensor, to find out later whether it has changed."""

    tensor: ref[Tensor]
    dtype: torch.dtype
    device: torch.device
    address: int
    writes: int
    """The number of times that it was written to."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Source":
        """The state of a tensor `[...]` now."""
        return cls(ref(tensor), tensor.dtype, tensor.device, tensor.data_ptr(), _writes(tensor))

    def is_still(self, now: Tensor) -> bool:
        """Whether a tensor `[...]` is the same one, unchanged in values, dtype and memory."""
        return self.stands_for(now) and self.dtype == now.dtype

    def stands_for(self, now: Tensor) -> bool:
        """Whether a tensor `[...]` is the same one, not written to and at most cast to a wider dtype."""
        if self.tensor() is not now or self.device != now.device or self.writes != _writes(now):
            return False
        if self.dtype == now.dtype:
            return self.address == now.data_ptr()
        return torch.promote_types(now.dtype, self.dtype) == now.dtype


def _writes(tensor: Tensor) -> int:
    """The number of times that a tensor was written to; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def keep_dtypes(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Undo a cast of a module's packed tensors but not a move; `before` are these tensors `[...]` before, by name."""
    for name, old in before.items():
        new = getattr(module, name)
        if new.dtype != old.dtype:
            setattr(module, name, old.to(new.device))
