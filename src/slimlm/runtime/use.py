"""Who multiplies in a whole model: choose it, and say it in words."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from slimlm.core.errors import KernelError
from slimlm.core.parts import Description
from slimlm.runtime import kernels, native
from slimlm.runtime.backends import cpu, triton
from slimlm.runtime.choose import Kernels, choose
from slimlm.runtime.gpu import device
from slimlm.runtime.linear import CompressedLinear, Multiplier


def multipliers(model: nn.Module) -> dict[str, Multiplier]:
    """The layers for which somebody is chosen, by name: the compressed ones and dense ones of 16 bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Multiplier)}


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Choose who multiplies in all layers from now on: "auto", "precise", "fast", "gpu" or "reference".

    Raises KernelError, and changes nothing, where kernels asked for by name do not take some layer. What was packed or mapped
    for one precision serves the other.
    """
    layers = multipliers(model)
    for name, layer in layers.items():
        try:
            choose(layer.stored(), kernels)
        except KernelError as error:
            raise KernelError(f"{name}: {error}") from error
    for layer in layers.values():
        layer.use_kernels(kernels)


def prefer_fast(model: nn.Module) -> None:
    """Let the layers that run on precise kernels because of "auto" run on fast ones."""
    for layer in multipliers(model).values():
        if layer.kernels == "auto" and layer.choice().backend.name == "cpu":
            layer.use_kernels("fast")


@contextmanager
def precisely(model: nn.Module) -> Iterator[None]:
    """Within this context layers that run on fast kernels run on precise ones."""
    fast = [layer for layer in multipliers(model).values() if layer.kernels == "fast"]
    for layer in fast:
        layer.use_kernels("precise")
    try:
        yield
    finally:
        for layer in fast:
            layer.use_kernels("fast")


def words(model: nn.Module) -> str | None:
    """Who multiplies the compressed layers, such as "cpu avx2, fast; 84 of 84 layers"; None where there are none.

    Of GPU kernels also how many launches serve several layers at once, which is settled when text is first written.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CompressedLinear)]
    if not layers:
        return None
    counts: Counter[str] = Counter()
    for layer in layers:
        backend = layer.choice().backend
        own = backend.name
        if isinstance(backend, cpu.Cpu):
            own = f"cpu {kernels.active()}, {backend.precision}"
        elif isinstance(backend, triton.Gpu):
            own = f"gpu {device.words(layer.stored().device)}"
        counts[own] += 1
    joints = [joint for layer in layers if isinstance(own := layer.prepared(), triton.Ready) and (joint := own.joint)]
    reasons = sorted({reason for layer in layers if (reason := layer.choice().refused) is not None})
    found = [f"{name}; {count} of {len(layers)} layers" for name, count in counts.most_common()]
    if joints:
        found.append(f"{len(joints)} of them, which share inputs, in {len({id(joint) for joint in joints})} launches")
    return "; ".join([*found, *reasons])


def prospect(layers: Sequence[Sequence[Description]]) -> str:
    """Who would multiply layers of these parts on this machine's CPU, and why not the kernels where they would not."""
    if native.library() is None:
        return f"reference; {len(layers)} of {len(layers)} layers; there are no CPU kernels: {native.status().reason}"
    reasons = Counter(reason for parts in layers if (reason := cpu.unfit(parts)) is not None)
    found = [f"cpu {kernels.active()}; {len(layers) - reasons.total()} of {len(layers)} layers"]
    return "; ".join([*found, *(f"reference for {count}: {reason}" for reason, count in reasons.most_common())])
