"""A GPU that is not there: its tensors lie in the CPU's memory, report another device, and refuse what a GPU refuses.

`FakeGpuTensor` wraps a CPU tensor. Inside `fake_gpu()` operations on such tensors run on the wrapped ones, and tensors that are
made on `FAKE_GPU` are wrapped. That is the device "meta", the only one besides "cpu" to which a torch built for the CPU can
switch. An operation that mixes them with CPU tensors fails, as on a GPU, except for what a GPU allows: tensors without
dimensions, and indices on the CPU. So code that forgets a device is found without a GPU. Values read in Python
(`float(tensor)`, `tolist`), each of which makes the CPU wait for a GPU, are counted.
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

FAKE_GPU = torch.device("meta")
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# In inference mode some operations come whole: `to`, `item` and `is_nonzero`.
_COPIES = {"_to_copy", "copy_", "_copy_from", "to"}
_READ = {"_local_scalar_dense", "item", "is_nonzero"}


class MixedDevicesError(Exception):
    """Tensors of two devices met."""


class FakeGpuTensor(Tensor):
    """A tensor that reports to be on the fake GPU."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> "FakeGpuTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            wrapped.shape,
            strides=wrapped.stride(),
            storage_offset=wrapped.storage_offset(),
            dtype=wrapped.dtype,
            device=FAKE_GPU,
        )
        made.wrapped = wrapped
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """As of every tensor, which torch leaves out for wrappers."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MixedDevicesError(f"{func} on a fake GPU tensor outside fake_gpu()")


@dataclass
class Counts:
    """What happened inside."""

    waits: int = 0
    """values read in Python, and tensors copied to the CPU"""
    operations: int = 0


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given: list[Tensor] = []
        tree_map(lambda t: given.append(t) if isinstance(t, Tensor) else None, (args, kwargs))
        fakes = [t for t in given if isinstance(t, FakeGpuTensor)]
        name = func.overloadpacket.__name__
        to = kwargs.get("device")
        wanted = None if to is None else torch.device(to)
        self.counts.operations += bool(fakes)
        if name in _READ and fakes:
            self.counts.waits += 1
        if fakes and name not in _COPIES:
            self._refuse_mixed(func, name, args, given)
        if wanted is not None and wanted == FAKE_GPU:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None) if wanted is not None else None
        if name in ("_to_copy", "to") and wanted is not None and wanted.type == "cpu" and fakes:
            self.counts.waits += 1
        known = {id(t.wrapped): t for t in fakes}
        cpu_args, cpu_kwargs = tree_map(lambda t: t.wrapped if isinstance(t, FakeGpuTensor) else t, (args, kwargs))
        found = func(*cpu_args, **cpu_kwargs)
        if wanted is not None:
            on_gpu = wanted == FAKE_GPU
        elif name == "copy_":
            on_gpu = isinstance(args[0], FakeGpuTensor)
        else:
            on_gpu = bool(fakes)
        if not on_gpu:
            return found

        def rewrapped(t: Any) -> Any:
            # A tensor that was changed in place keeps its wrapper.
            return (known[id(t)] if id(t) in known else FakeGpuTensor(t)) if isinstance(t, Tensor) else t

        return tree_map(rewrapped, found)

    @staticmethod
    def _refuse_mixed(func: Any, name: str, args: Any, given: list[Tensor]) -> None:
        indices: list[Tensor] = []
        if name in _INDEXED:
            tree_map(lambda t: indices.append(t) if isinstance(t, Tensor) else None, args[1])
        allowed = {id(index) for index in indices}
        real = [t for t in given if not isinstance(t, FakeGpuTensor) and t.ndim > 0 and id(t) not in allowed]
        if real:
            raise MixedDevicesError(f"{func}: {[list(t.shape) for t in real]} on the CPU with tensors on the GPU")


class _Made(TorchFunctionMode):
    """`torch.tensor` fills a tensor where no mode sees it, so it is made on the CPU and sent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == FAKE_GPU:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(FAKE_GPU)
        return func(*args, **kwargs)


@contextmanager
def fake_gpu() -> Iterator[Counts]:
    """Within this context there is a GPU, `FAKE_GPU`. Inference mode, in which views of wrappers fail, is `torch.no_grad`."""
    counts = Counts()
    with _Operations(counts), _Made(), mock.patch.object(torch, "inference_mode", torch.no_grad):
        yield counts


def to_fake_gpu(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to the fake GPU, which `module.to` cannot do, as wrappers are no plain tensors."""
    for own in module.modules():
        for name, parameter in list(own.named_parameters(recurse=False)):
            setattr(own, name, nn.Parameter(FakeGpuTensor(parameter.detach()), requires_grad=False))
        for name, buffer in list(own.named_buffers(recurse=False)):
            own.register_buffer(name, FakeGpuTensor(buffer))
    return module


def unwrapped(tensor: Tensor) -> Tensor:
    """The CPU tensor that a tensor wraps, or itself."""
    return tensor.wrapped if isinstance(tensor, FakeGpuTensor) else tensor
