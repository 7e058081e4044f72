"""Calls of linear layers without the cost of `nn.Module.__call__`, and one call for several layers that share their input."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from slimlm.runtime.backends import cpu, triton
from slimlm.runtime.cpu.bindings import PackedProducts
from slimlm.runtime.gpu import stacking
from slimlm.runtime.linear import CompressedLinear

Call = Callable[[Tensor], Tensor]
GroupedCall = Callable[[Tensor], Sequence[Tensor]]
"""From the shared input to the outputs of all layers in order."""


def direct_call(module: nn.Module) -> Call:
    """A function that computes what the module computes, without hooks, so the module must have none.

    Weights are looked up now: a module that is moved, cast or replaced afterwards needs a new call of this function.
    """
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward


def grouped_call(modules: Sequence[nn.Module]) -> GroupedCall:
    """One function for layers that share their input `[tokens, in]`; gives their outputs `[tokens, out]` in order.

    Layers that all run on the CPU kernels in one precision are multiplied in one call, without gradients; layers that all run
    on the GPU kernels and can be stacked, in one launch; others one after another. As with `direct_call`, backends are looked
    up now. The caller may change the outputs.
    """
    if (call := _kernel_call(modules)) is not None:
        return call
    calls = [direct_call(module) for module in modules]
    if len(calls) == 2:
        first, second = calls
        return lambda x: (first(x), second(x))
    return lambda x: tuple([call(x) for call in calls])


def _kernel_call(modules: Sequence[nn.Module]) -> GroupedCall | None:
    """The layers as one call of the kernels; None where they cannot be."""
    layers = [module for module in modules if isinstance(module, CompressedLinear)]
    backends = [layer.selection().backend for layer in layers]
    if len(layers) == len(modules) and all(isinstance(backend, triton.Gpu) for backend in backends):
        return _one_launch(layers)
    precisions = {backend.precision for backend in backends if isinstance(backend, cpu.Cpu)}
    if len(layers) < len(modules) or not all(isinstance(backend, cpu.Cpu) for backend in backends) or len(precisions) != 1:
        return None
    prepared: list[cpu.PreparedOnCpu] = [layer.prepare() for layer in layers]
    outs = [layer.out_features for layer in layers]
    packed = PackedProducts([one.blob for one in prepared], [one.bias for one in prepared], outs, layers[0].in_features)
    return partial(packed, precision=precisions.pop())


def _one_launch(layers: Sequence[CompressedLinear]) -> GroupedCall | None:
    prepared: list[triton.PreparedOnGpu] = [layer.prepare() for layer in layers]
    if stacking.refuses([own.layer for own in prepared]) is not None:
        return None
    return triton.StackedLayers(prepared)
