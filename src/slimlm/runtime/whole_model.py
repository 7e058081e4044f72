"""Who multiplies in a whole model: choose it, and say it in words."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from slimlm.core.errors import KernelError
from slimlm.core.parts.pack import PartEntries
from slimlm.runtime.backends import cpu, triton
from slimlm.runtime.cpu import kernels, native
from slimlm.runtime.dense import WideEmbedding
from slimlm.runtime.dispatch import Kernels, choose
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.gpu import device, products
from slimlm.runtime.linear import CompressedLinear, Multiplier
from slimlm.runtime.memory import free_on_card


def multipliers(model: nn.Module) -> dict[str, Multiplier]:
    """The layers for which somebody is chosen, by name: the compressed ones and dense ones of 16 bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Multiplier)}


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Choose who multiplies in all layers from now on: "auto", "precise", "fast", "gpu" or "reference".

    Raises KernelError, and changes nothing, where kernels asked for by name do not take some layer. What was packed or mapped
    for one precision serves the other. For activations of 32 bits "auto" is the reference on a card that has room for it.
    """
    layers = multipliers(model)
    for name, layer in layers.items():
        try:
            choose(layer.stored(), kernels)
        except KernelError as error:
            raise KernelError(f"{name}: {error}") from error
    for layer in layers.values():
        layer.use_kernels(kernels)
    if kernels == "auto" and (dtype := _unpacked_for(model)) is not None:
        _pass_gpu_over([layer for layer in layers.values() if isinstance(layer.choice().backend, triton.Gpu)], dtype)


def activations(model: nn.Module) -> torch.dtype | None:
    """The dtype of what the model's input embedding gives, and so of activations; None: it has no such embedding."""
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(embedding, WideEmbedding | CompressedEmbedding):
        return embedding.activations
    weight = getattr(embedding, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else None


def unpacks(model: nn.Module) -> str | None:
    """Why GPU kernels unpack weights for every product of this model, in words; None: they multiply them packed."""
    dtype = _unpacked_for(model)
    return f"{_name(dtype)}: weights are unpacked for every product; {_PACKED}" if dtype is not None else None


_PACKED = "dtype=torch.bfloat16 multiplies them packed"


def _unpacked_for(model: nn.Module) -> torch.dtype | None:
    """The dtype of activations that layers on GPU kernels unpack their weights for; None: it is none of these."""
    dtype = activations(model)
    if dtype is None or dtype in products.NARROW:
        return None
    taken = any(isinstance(layer.choice().backend, triton.Gpu) for layer in multipliers(model).values())
    return dtype if taken else None


def _name(dtype: torch.dtype) -> str:
    return f"activations are {str(dtype).removeprefix('torch.')}"


def _pass_gpu_over(layers: Sequence[Multiplier], dtype: torch.dtype) -> None:
    """Let the reference multiply, which unpacks weights once, where dense matrices of this dtype take half of what is free."""
    dense = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    if 2 * dense > free_on_card(layers[0].stored().device):
        return
    for layer in layers:
        layer.pass_kernels_over(
            f"{_name(dtype)}: GPU kernels would unpack weights for every product, and there is room to do it once; {_PACKED}"
        )


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
    if (unpacked := unpacks(model)) is not None:
        reasons.append(unpacked)
    found = [f"{name}; {count} of {len(layers)} layers" for name, count in counts.most_common()]
    if joints:
        found.append(f"{len(joints)} of them, which share inputs, in {len({id(joint) for joint in joints})} launches")
    return "; ".join([*found, *reasons])


def prospect(layers: Sequence[PartEntries]) -> str:
    """Who would multiply layers of these parts on this machine's CPU, and why not the kernels where they would not."""
    if native.library() is None:
        return f"reference; {len(layers)} of {len(layers)} layers; there are no CPU kernels: {native.status().reason}"
    reasons = Counter(reason for entries in layers if (reason := cpu.unfit(entries)) is not None)
    found = [f"cpu {kernels.active()}; {len(layers) - reasons.total()} of {len(layers)} layers"]
    return "; ".join([*found, *(f"reference for {count}: {reason}" for reason, count in reasons.most_common())])
