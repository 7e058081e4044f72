"""The model that a folder's config describes, on the meta device, and whether stored tensors fit it.

Both are checked before any tensor is read or allocated: a config of a few bytes can ask for any amount of memory and time.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slimlm.core.errors import ModelError, first_line, is_out_of_memory
from slimlm.core.parts.pack import StoredEntry
from slimlm.models.experts import take_apart
from slimlm.models.opening import OWN_ATTENTION, loading_settings, read_config, refuse_foreign_code
from slimlm.models.structure import LINEAR_KINDS, weight_of
from slimlm.storage.entries import Description

_BLOCKS = ("num_hidden_layers", "num_layers")
"""Names in configs of the number of blocks, each of which has at least one tensor."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names in configs of the number of experts, each of which has at least one row of a tensor."""
_SPARE = 2**26
"""Bytes that computed buffers (rotary tables) may take beyond sixteen times the bytes of the stored tensors, and weights that a
model may have beyond eight for each of those bytes."""


def meta_model(folder: Path, stored: Mapping[str, Tensor], experts: Iterable[str] = ()) -> PreTrainedModel:
    """The model that a folder's config describes, on the meta device, of the class that transformers has for it.

    Args:
        folder: holds the config.
        stored: the tensors of its files, of any shapes `[...]`; their number and sizes limit what the config may ask for.
        experts: the names of modules whose experts the folder stores as linear layers (`models.experts`).

    Raises:
        ModelError: transformers cannot make a causal language model of the config, or the config asks for far more than the
            stored tensors could fill.
    """
    refuse_foreign_code(read_config(str(folder)), str(folder))
    rows = sum(len(tensor) if tensor.ndim else 1 for tensor in stored.values())
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if (named := config._attn_implementation) is not None and named not in OWN_ATTENTION:
            config._attn_implementation = None
        for each in (config, *_inner_configs(config)):
            for name, most in (*dict.fromkeys(_BLOCKS, len(stored)).items(), *dict.fromkeys(_EXPERTS, rows).items()):
                count = getattr(each, name, None)
                if isinstance(count, int) and count > most:
                    raise ModelError(
                        f"{folder} has {len(stored)} tensors of {rows} rows in all, and its config says {name} = {count}"
                    )
        with loading_settings(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # An invalid config can make transformers raise any exception.
        raise ModelError(
            f"transformers cannot make a causal language model of the config in {folder}: {first_line(error)}"
        ) from error
    state = set(model.state_dict())
    computed = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in state)
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > 8 * size + _SPARE:
        raise ModelError(f"the config in {folder} asks for {weights} weights, and its tensors have {size} bytes")
    if computed > 16 * size + _SPARE:
        raise ModelError(f"the config in {folder} asks for tables of {computed} bytes besides tensors of {size} bytes")
    for name in experts:
        if name not in dict(model.named_modules()):
            raise ModelError(f"the config in {folder} names experts in {name}, which {type(model).__name__} does not have")
        take_apart(model, name)
    return model


def _inner_configs(config: Any) -> list[Any]:
    names = getattr(config, "sub_configs", None) or {}
    return [inner for name in names if (inner := getattr(config, name, None)) is not None]


def misfits(model: nn.Module, about: Description, stored: Mapping[str, Tensor]) -> Iterator[str]:
    """Why tensors cannot be those of this model: one message for each layer or tensor that does not fit.

    Args:
        model: on the meta device.
        about: the compressed layers and embeddings, as a checkpoint's config describes them.
        stored: all other stored tensors, of any shapes `[...]`, by name in the model's state.

    Yields:
        The messages.
    """
    modules = dict(model.named_modules())
    entries: dict[str, StoredEntry] = {**about.layers, **about.embeddings}
    for name, entry in entries.items():
        kinds, what = (LINEAR_KINDS, "linear layer") if name in about.layers else ((nn.Embedding,), "embedding")
        module = modules.get(name)
        if not isinstance(module, kinds):
            yield f"{name} is described as a compressed {what}, and {type(model).__name__} has no {what} of that name"
            continue
        if (shape := tuple(weight_of(module).shape)) != entry.shape:
            yield f"{name} is described with the shape {list(entry.shape)}; the model's is {list(shape)}"
        has_bias = getattr(module, "bias", None) is not None
        if name in about.layers and has_bias != (bias := about.layers[name].bias):
            described, found = ("with", "none") if bias else ("without", "one")
            yield f"{name} is described {described} a bias; the model's layer has {found}"
    state = model.state_dict(keep_vars=True)
    compressed = {f"{name}.weight" for name in entries}
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if name not in compressed:
            tied.setdefault(id(tensor), []).append(name)
    for names in tied.values():
        held = [name for name in names if name in stored]
        if not held:
            yield f"{names[0]} is missing: nothing is stored under that name"
        for name in held:
            if stored[name].shape != state[name].shape:
                yield f"{name} is stored with the shape {list(stored[name].shape)}; the model's is {list(state[name].shape)}"
            elif stored[name].is_floating_point() != state[name].is_floating_point():
                yield f"{name} is stored as {stored[name].dtype}; the model's is {state[name].dtype}"
    known = {name for names in tied.values() for name in names}
    for name in stored:
        if name not in known:
            yield f"{name} is unexpected: it is stored, and neither the model nor its description has a tensor of that name"
