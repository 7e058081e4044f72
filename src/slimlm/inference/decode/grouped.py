"""Calls of linear layers without the cost of `nn.Module.__call__`, and of several layers that share an input."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from slimlm.runtime.backends import cpu, triton
from slimlm.runtime.cpu.kernels import Packed
from slimlm.runtime.gpu import layout
from slimlm.runtime.linear import CompressedLinear


def direct(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the module computes, called with the least ceremony; hooks are not run, so the caller must know of none.

    Weights are looked up now: a module that is moved, cast or swapped afterwards needs a new call of this function.
    """
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward


def joint(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]]:
    """One call for layers that share their input `[tokens, in]`; gives their outputs `[tokens, out]` in order.

    The outputs are the caller's to change. Layers that all run on the CPU kernels are multiplied in one call, without
    gradients, and those that all run on the GPU kernels and are of one kind in one launch; others are called in turn. As with
    `direct`, who multiplies is settled now.
    """
    if (together := _together(modules)) is not None:
        return together
    calls = [direct(module) for module in modules]
    if len(calls) == 2:
        first, second = calls
        return lambda x: (first(x), second(x))
    return lambda x: tuple([call(x) for call in calls])


def _together(modules: Sequence[nn.Module]) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """The layers as one call of the kernels; None where some of them run otherwise."""
    layers = [module for module in modules if isinstance(module, CompressedLinear)]
    backends = [layer.choice().backend for layer in layers]
    if len(layers) == len(modules) and all(isinstance(backend, triton.Gpu) for backend in backends):
        return _in_one_launch(layers)
    precisions = {backend.precision for backend in backends if isinstance(backend, cpu.Cpu)}
    if len(layers) < len(modules) or not all(isinstance(backend, cpu.Cpu) for backend in backends) or len(precisions) != 1:
        return None
    ready: list[cpu.Prepared] = [layer.prepare() for layer in layers]
    outs = [layer.out_features for layer in layers]
    packed = Packed([one.blob for one in ready], [one.bias for one in ready], outs, layers[0].in_features)
    return partial(packed, precision=precisions.pop())


def _in_one_launch(layers: Sequence[CompressedLinear]) -> Callable[[Tensor], Sequence[Tensor]] | None:
    ready: list[triton.Ready] = [layer.prepare() for layer in layers]
    if layout.apart([own.layer for own in ready]) is not None:
        return None
    return triton.Together(ready)
