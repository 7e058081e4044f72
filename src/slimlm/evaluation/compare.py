"""Any model, compressed or dense, opened to be compared with another."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import DataError
from slimlm.events import Notify, logged
from slimlm.inference.load import load
from slimlm.models.dense import open_dense
from slimlm.models.opening import folder_of, open_tokenizer, quantization_of, read_config
from slimlm.models.structure import blocks_of, linears_of, weight_of
from slimlm.runtime.dispatch import uses_cpu_kernels
from slimlm.runtime.gpu import device as gpu
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to run, with its size."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bytes: int
    """of its tensors as stored"""
    bits_per_weight: float
    """of the linear layers in the blocks: stored bits over weights"""


def open_any(source: str, *, kernels: Kernels = "reference", device: torch.device = _CPU, notify: Notify = logged) -> OpenModel:
    """Open a slimlm checkpoint or a dense model on a device.

    Activations are float32, except for checkpoints on GPU kernels, where they have the dtype of the original model.

    Args:
        source: a folder, or a name on the hub.
        kernels: for a checkpoint, as in `slimlm.load`.
        device: where it is to run.
        notify: for a checkpoint, as in `slimlm.load`.

    Raises:
        SlimlmError: the model cannot be opened.
        DataError: it has no tokenizer.
    """
    method = quantization_of(read_config(source), source).get("quant_method")
    if method == checkpoint.METHOD:
        # With CPU kernels "auto" also means float32 activations, and tensors that are stored in 16 bits remain so.
        ready = uses_cpu_kernels(kernels) if device.type == "cpu" else kernels != "reference" and gpu.refuses(device) is None
        dtype = "auto" if ready else torch.float32
        model = load(source, dtype=dtype, device=device, kernels=kernels, notify=notify)
        tokenizer = open_tokenizer(source)
        inside = (module for block in blocks_of(model).values() for module in block.modules())
        layers = [module for module in inside if isinstance(module, CompressedLinear)]
        bits = sum(8 * t.numel() * t.element_size() for m in layers for t in m.packed().values())
        per_weight = bits / sum(m.in_features * m.out_features for m in layers)
        size = checkpoint.stored_bytes(folder_of(source))
    else:
        dense = open_dense(source)
        model, tokenizer, size = dense.model.to(device), dense.tokenizer, dense.bytes
        per_weight = dense_bits_per_weight(blocks_of(model), dense.bits)
    if tokenizer is None:
        raise DataError(f"{source} has no tokenizer, so text cannot be read; add its tokenizer files to the folder")
    return OpenModel(source, model, tokenizer, size, per_weight)


def dense_bits_per_weight(blocks: dict[str, nn.Module], bits: Mapping[str, float]) -> float:
    """Stored bits per weight of the linear layers in a dense model's blocks.

    Args:
        blocks: the blocks by full name; their weights need no values.
        bits: of an element of every tensor as stored, by name.
    """
    linears = {f"{block}.{name}": linear for block, module in blocks.items() for name, linear in linears_of(module).items()}
    weights = {f"{name}.weight": weight_of(linear).numel() for name, linear in linears.items()}
    return sum(bits[name] * count for name, count in weights.items()) / max(1, sum(weights.values()))
