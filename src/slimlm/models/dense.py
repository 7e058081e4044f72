"""A dense model whose weights are all in memory, in float32."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.events import silent
from slimlm.models.gguf_header import is_gguf
from slimlm.models.lazy import open_lazy
from slimlm.models.opening import open_generation_config


@dataclass(frozen=True)
class DenseModel:
    """A model in float32 on the CPU, with its stored dtypes and config, so that it can be written back unchanged."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    dtypes: dict[str, torch.dtype]
    """of every tensor as stored, by name; casting back gives the stored values bit for bit"""
    bits: dict[str, float]
    """of an element of every tensor as `LazyModel.bits` has them"""
    bytes: int
    """size of its tensors as stored; tied tensors count once"""
    config: dict[str, Any]
    """as it is to be written with a checkpoint"""
    experts: list[str]
    """the names of the modules whose experts were taken apart into linear layers"""


def open_dense(source: str) -> DenseModel:
    """Load a causal language model in float32; code that comes with it is never run.

    Args:
        source: a folder, a name on the hub, a GGUF file or a folder with one.

    Raises:
        ModelError: the model is missing, damaged, incomplete or already quantized.
    """
    with TemporaryDirectory(prefix="slimlm-") if is_gguf(source) else nullcontext() as scratch:
        lazy = open_lazy(source, None if scratch is None else Path(scratch), silent)
        for name, tensor in lazy.model.state_dict(keep_vars=True).items():
            stored = lazy.weights[name]
            tensor.data = stored.to(torch.float32 if stored.is_floating_point() else stored.dtype, copy=True)
            lazy.release([stored])
        model = lazy.model
        model.name_or_path = model.config.name_or_path = source
        model.generation_config = open_generation_config(lazy.folder)
    return DenseModel(source, model, lazy.tokenizer, lazy.dtypes, lazy.bits, lazy.bytes, lazy.config, lazy.experts)
