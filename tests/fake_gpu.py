"""A card that is not there: its tensors lie in the CPU's memory, say that they are elsewhere, and refuse what a card refuses.

`FarTensor` wraps a CPU tensor. Inside `far_device()` operations on such tensors run on what they wrap, and tensors that
are made on `FAR` are wrapped. It is called "meta", the one device beside "cpu" to which a torch built for the CPU can
switch. An operation that mixes them with CPU tensors fails, as on a card, but for what a card allows: tensors without
dimensions, and indices on the CPU. So code that forgets a device is found without one. Values read in Python
(`float(tensor)`, `tolist`), each of which makes the CPU wait for a card, are counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

FAR = torch.device("meta")
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# In inference mode some operations come whole: `to`, `item` and `is_nonzero`.
_COPIES = {"_to_copy", "copy_", "_copy_from", "to"}
_READ = {"_local_scalar_dense", "item", "is_nonzero"}


class MixedDevicesError(Exception):
    """Tensors of two devices met."""


class FarTensor(Tensor):
    """A tensor that says it is on the card."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """As of every tensor, which torch leaves out for wrappers."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MixedDevicesError(f"{func} on a far tensor outside far_device()")


@dataclass
class Counts:
    """What happened inside."""

    waits: int = 0
    """values read in Python, and far tensors copied to the CPU"""
    operations: int = 0


class _Far(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given: list[Tensor] = []
        tree_map(lambda t: given.append(t) if isinstance(t, Tensor) else None, (args, kwargs))
        far = [t for t in given if isinstance(t, FarTensor)]
        name = func.overloadpacket.__name__
        to = kwargs.get("device")
        wanted = None if to is None else torch.device(to)
        self.counts.operations += bool(far)
        if name in _READ and far:
            self.counts.waits += 1
        if far and name not in _COPIES:
            self._refuse_mixed(func, name, args, given)
        if wanted is not None and wanted == FAR:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None) if wanted is not None else None
        if name in ("_to_copy", "to") and wanted is not None and wanted.type == "cpu" and far:
            self.counts.waits += 1
        known = {id(t.near): t for t in far}
        near_args, near_kwargs = tree_map(lambda t: t.near if isinstance(t, FarTensor) else t, (args, kwargs))
        found = func(*near_args, **near_kwargs)
        if wanted is not None:
            stays_far = wanted == FAR
        elif name == "copy_":
            stays_far = isinstance(args[0], FarTensor)
        else:
            stays_far = bool(far)
        if not stays_far:
            return found

        def wrapped(t: Any) -> Any:
            # What was changed in place is the tensor that it was.
            return (known[id(t)] if id(t) in known else FarTensor(t)) if isinstance(t, Tensor) else t

        return tree_map(wrapped, found)

    @staticmethod
    def _refuse_mixed(func: Any, name: str, args: Any, given: list[Tensor]) -> None:
        indices: list[Tensor] = []
        if name in _INDEXED:
            tree_map(lambda t: indices.append(t) if isinstance(t, Tensor) else None, args[1])
        near = [t for t in given if not isinstance(t, FarTensor) and t.ndim > 0 and not any(t is index for index in indices)]
        if near:
            raise MixedDevicesError(f"{func}: {[list(t.shape) for t in near]} on the CPU with tensors on the card")


class _Made(TorchFunctionMode):
    """`torch.tensor` fills a tensor where no mode sees it, so it is made on the CPU and sent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == FAR:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(FAR)
        return func(*args, **kwargs)


@contextmanager
def far_device() -> Iterator[Counts]:
    """Meanwhile there is a card, `FAR`. Inference mode, in which views of wrappers fail, only leaves gradients out."""
    counts = Counts()
    with _Far(counts), _Made(), mock.patch.object(torch, "inference_mode", torch.no_grad):
        yield counts


def send(module: nn.Module) -> nn.Module:
    """The module's parameters and buffers on the card; what `module.to` cannot do, as wrappers are no plain tensors."""
    for own in module.modules():
        for name, parameter in list(own.named_parameters(recurse=False)):
            setattr(own, name, nn.Parameter(FarTensor(parameter.detach()), requires_grad=False))
        for name, buffer in list(own.named_buffers(recurse=False)):
            own.register_buffer(name, FarTensor(buffer))
    return module


def near(tensor: Tensor) -> Tensor:
    """What a tensor wraps, or itself."""
    return tensor.near if isinstance(tensor, FarTensor) else tensor
