"""Open any model folder, compressed or dense, and measure it beside another."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import DataError
from slimlm.load import load
from slimlm.models.opening import open_dense, open_tokenizer
from slimlm.models.structure import linears_of
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint


@dataclass(frozen=True)
class OpenModel:
    """A model ready to run in float32, with its size."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bytes: int
    """tensors as stored"""
    bits_per_weight: float
    """of the linear layers in the blocks: stored bits over weights"""


def open_any(source: str) -> OpenModel:
    """Open a slimlm checkpoint or a dense model in float32; raises where it has no tokenizer."""
    if checkpoint.is_checkpoint(Path(source)):
        model, tokenizer = load(source, dtype=torch.float32), open_tokenizer(source)
        layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
        bits = sum(8 * t.numel() * t.element_size() for m in layers for t in m.packed().values())
        per_weight = bits / sum(m.in_features * m.out_features for m in layers)
        size = checkpoint.stored_bytes(Path(source))
    else:
        dense = open_dense(source)
        model, tokenizer, size = dense.model, dense.tokenizer, dense.bytes
        names = [f"{name}.weight" for name in linears_of(model)]
        bits = sum(8 * model.get_parameter(n).numel() * dense.dtypes[n].itemsize for n in names)
        per_weight = bits / sum(model.get_parameter(n).numel() for n in names)
    if tokenizer is None:
        raise DataError(f"{source} has no tokenizer, so text cannot be read; add its tokenizer files to the folder")
    return OpenModel(source, model, tokenizer, size, per_weight)


def same_tokens(one: OpenModel, other: OpenModel, sample: str) -> bool:
    """Whether both models' tokenizers cut a text alike, so that perplexities per token can be compared."""

    def cut(opened: OpenModel) -> list[int]:
        return list(opened.tokenizer(sample, add_special_tokens=False)["input_ids"])

    return cut(one) == cut(other)
