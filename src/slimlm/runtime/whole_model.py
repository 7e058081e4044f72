"""Backend selection for all layers of a model, and its description."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, get_args, runtime_checkable

import torch
from torch import nn

from slimlm.core.arguments import one_of
from slimlm.core.errors import KernelError
from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry, PartEntries
from slimlm.kernels import native
from slimlm.runtime.arguments import refuse_no_module
from slimlm.runtime.backends import cpu, triton
from slimlm.runtime.backends.reference import DenseWeight
from slimlm.runtime.cpu import bindings
from slimlm.runtime.dense import WideEmbedding
from slimlm.runtime.dispatch import select_backend
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.gpu import device, products
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.linear import CompressedLinear, PackedLayer
from slimlm.runtime.memory import free_on_gpu


@runtime_checkable
class _LanguageModel(Protocol):
    """The part of the interface of transformers' models that is used here."""

    def get_input_embeddings(self) -> nn.Module: ...


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The layers that have a backend, by name: the compressed ones and the dense ones of 16 bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def packed_modules(model: nn.Module) -> tuple[dict[str, LayerEntry], dict[str, EmbeddingEntry]]:
    """The entries of a model's compressed layers and embeddings, by full name; that of a tied layer names its embedding."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, CompressedEmbedding)}
    owners = {id(module): name for name, module in tables.items()}
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            tied_to = owners[id(module.embedding)] if isinstance(module, TiedLinear) else None
            layers[name] = replace(module.describe(), tied_to=tied_to)
    return layers, {name: module.describe() for name, module in tables.items()}


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Select the backends of all layers of a model again.

    Layers that were packed for one precision of the CPU kernels are not packed again for the other. A forward that runs in
    another thread meanwhile computes each layer with the backend of before or the one of after.

    Args:
        model: a model opened by `slimlm.load`, or by transformers after `import slimlm`.
        kernels: "auto", "precise", "fast", "gpu" or "reference", as in `slimlm.load`. With float32 activations "auto" is the
            reference on a GPU that has memory for the dense matrices.

    Raises:
        KernelError: kernels that were asked for by name do not take some layer; nothing is changed then.
    """
    refuse_no_module(model)
    one_of(kernels, "kernels", get_args(Kernels), KernelError)
    layers = packed_layers(model)
    for name, layer in layers.items():
        try:
            select_backend(layer.stored(), kernels)
        except KernelError as error:
            raise KernelError(f"{name}: {error}") from error
    for layer in layers.values():
        layer.use_kernels(kernels)
    if kernels == "auto" and (dtype := _unpacked_for(model)) is not None:
        _prefer_reference([layer for layer in layers.values() if isinstance(layer.selection().backend, triton.Gpu)], dtype)


def prepare(model: nn.Module) -> None:
    """Pack every layer for its backend now, rather than at its first product.

    `slimlm.load` does that for layers on kernels. For a model that transformers opened, and for layers on the reference, which
    makes a dense matrix of each, it is of use before `torch.compile`: a graph breaks at every layer that is not packed yet.

    Args:
        model: a model opened by `slimlm.load`, or by transformers after `import slimlm`.
    """
    refuse_no_module(model)
    dtype = activation_dtype(model)
    for layer in packed_layers(model).values():
        prepared = layer.prepare()
        if isinstance(prepared, DenseWeight) and dtype is not None:
            prepared.fitting(torch.empty(0, dtype=dtype, device=layer.stored().device))


def activation_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the input embedding's output, and so of the activations; None: the model has no input embedding."""
    embedding = model.get_input_embeddings() if isinstance(model, _LanguageModel) else None
    if isinstance(embedding, WideEmbedding | CompressedEmbedding):
        return embedding.activations
    weight = getattr(embedding, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else None


def unpacking_reason(model: nn.Module) -> str | None:
    """Why the GPU kernels unpack weights for every product of this model; None: they multiply by packed weights."""
    dtype = _unpacked_for(model)
    return f"{_name(dtype)}: weights are unpacked for every product; {_PACKED}" if dtype is not None else None


_PACKED = "dtype=torch.bfloat16 multiplies them packed"


def _unpacked_for(model: nn.Module) -> torch.dtype | None:
    """The dtype of activations for which the GPU kernels unpack weights; None: no layer of the model is concerned."""
    dtype = activation_dtype(model)
    if dtype is None or dtype in products.NARROW:
        return None
    concerned = any(isinstance(layer.selection().backend, triton.Gpu) for layer in packed_layers(model).values())
    return dtype if concerned else None


def _name(dtype: torch.dtype) -> str:
    return f"activations are {str(dtype).removeprefix('torch.')}"


def _prefer_reference(layers: Sequence[PackedLayer], dtype: torch.dtype) -> None:
    """Use the reference, which unpacks weights once, where dense matrices of this dtype take up to half of the free memory."""
    dense = sum(layer.in_features * layer.out_features for layer in layers) * dtype.itemsize
    if 2 * dense > free_on_gpu(layers[0].stored().device):
        return
    for layer in layers:
        layer.use_reference(
            f"{_name(dtype)}: GPU kernels would unpack weights for every product, and there is room to do it once; {_PACKED}"
        )


def prefer_fast(model: nn.Module) -> None:
    """Switch the layers for which "auto" selected precise CPU kernels to fast ones."""
    for layer in packed_layers(model).values():
        if layer.kernels == "auto" and layer.selection().backend.name == "cpu":
            layer.use_kernels("fast")


@contextmanager
def precise_kernels(model: nn.Module) -> Iterator[None]:
    """Within this context layers on fast CPU kernels run on precise ones."""
    fast = [layer for layer in packed_layers(model).values() if layer.kernels == "fast"]
    for layer in fast:
        layer.use_kernels("precise")
    try:
        yield
    finally:
        for layer in fast:
            layer.use_kernels("fast")


def describe(model: nn.Module) -> str | None:
    """The backends of a model's compressed layers, such as "cpu avx2, fast; 84 of 84 layers"; None: it has no such layer.

    For GPU kernels it also says how many launches serve several layers at once, which is known once the model has generated.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, CompressedLinear)]
    if not layers:
        return None
    counts: Counter[str] = Counter()
    for layer in layers:
        backend = layer.selection().backend
        name = backend.name
        if isinstance(backend, cpu.Cpu):
            name = f"cpu {bindings.active_variant()}, {backend.precision}"
        elif isinstance(backend, triton.Gpu):
            name = f"gpu {device.describe(layer.stored().device)}"
        counts[name] += 1
    stacks = [stack for layer in layers if isinstance(own := layer.prepared(), triton.PreparedOnGpu) and (stack := own.stack)]
    reasons = sorted({reason for layer in layers if (reason := layer.selection().refused) is not None})
    if (unpacked := unpacking_reason(model)) is not None:
        reasons.append(unpacked)
    found = [f"{name}; {count} of {len(layers)} layers" for name, count in counts.most_common()]
    if stacks:
        found.append(f"{len(stacks)} of them, which share inputs, in {len({id(stack) for stack in stacks})} launches")
    return "; ".join([*found, *reasons])


def describe_backends(layers: Sequence[PartEntries]) -> str:
    """The backends that layers of these parts would have on this machine's CPU, and why not the kernels where they would not.

    Args:
        layers: the entries of each layer's parts.
    """
    if native.library() is None:
        return f"reference; {len(layers)} of {len(layers)} layers; there are no CPU kernels: {native.status().reason}"
    reasons = Counter(reason for entries in layers if (reason := cpu.unfit(entries)) is not None)
    found = [f"cpu {bindings.active_variant()}; {len(layers) - reasons.total()} of {len(layers)} layers"]
    return "; ".join([*found, *(f"reference for {count}: {reason}" for reason, count in reasons.most_common())])
