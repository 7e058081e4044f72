"""The tensors of a model's files that its class has no place for: which are stored as they are, left out, or refused.

A causal language model may be a part of what its files hold: they may have layers for multi-token prediction or a vision tower
as well. Such tensors are stored with the checkpoint as they are. What the class computes for itself (rotary tables, masks) is
left out. A tensor that lies inside a module of the class, such as another block or another bias, means that the class would
compute something else than the files were made for: that is refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.core.errors import ModelError
from slimlm.models.structure import blocks_of

_COMPUTED = frozenset(("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "masked_bias", "position_ids"))
"""Last parts of names of buffers that older versions of classes stored and newer ones compute."""
_QUANTIZED = frozenset(
    (
        "qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format", "quant_map",
        "nested_quant_map", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_packed", "weight_shape",
        "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale", "input_zero_point",
        "scale_inv", "bitsandbytes__nf4", "bitsandbytes__fp4",
    )
)  # fmt: skip
"""Last parts of names of tensors that formats of quantized weights store with the codes of a layer."""
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
"""Parts of names that programs add which wrap a model: DistributedDataParallel, torch.compile, FSDP, DeepSpeed."""
_NO_LANGUAGE_MODELS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "RewardModel")
_MULTIMODAL = "ForConditionalGeneration"
_FURTHER = "multi-token prediction"
_NAMED = 2
"""The most names of each part that a message gives."""


@dataclass(frozen=True)
class Unplaced:
    """What becomes of the tensors that a class has no place for."""

    stored: dict[str, Tensor] = field(default_factory=dict)
    """those that a checkpoint stores as they are: views of the files, by their names there"""
    left_out: dict[str, str] = field(default_factory=dict)
    """the names in the files of the others, and why they are left out"""
    message: str | None = None
    """what the user should know of those that are stored, and of those that slimlm cannot read"""

    @property
    def bytes(self) -> int:
        """Size of the tensors that are stored as they are."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored.values())


@dataclass(frozen=True)
class Surroundings:
    """What is known of a model while its files are compared with its class."""

    source: str
    """the model's name in messages"""
    model: PreTrainedModel
    """the model, which may be on the meta device"""
    config: Mapping[str, Any]
    """the content of config.json"""
    stored: Mapping[str, Tensor]
    """the tensors of the files, of any shapes `[...]`, by their names there"""
    unread: Mapping[str, tuple[str, Tensor]]
    """tensors of dtypes that slimlm does not read: the dtype, and the bytes"""

    @property
    def kind(self) -> str:
        """The name of the class."""
        return type(self.model).__name__

    @cached_property
    def stack(self) -> tuple[str, int]:
        """The name of the list of blocks, and the number of blocks."""
        blocks = list(blocks_of(self.model))
        return blocks[0].rpartition(".")[0], len(blocks)


def fate_of(around: Surroundings, without: Mapping[str, tuple[str, ...]], twice: Iterable[tuple[str, str]]) -> Unplaced:
    """Decide what becomes of the tensors of the files that the class has no place for.

    Args:
        around: the model and its files.
        without: the names of these tensors in the files, and the names that transformers looks for in the class.
        twice: pairs of names in the files that have the same name in the class.

    Raises:
        ModelError: a tensor shows that the class is not what the files were made for, or that they are no full model.
    """
    modules = dict(around.model.named_modules())
    computed = {name for name, _ in around.model.named_buffers()} - set(around.model.state_dict())
    ignored = _ignored_by(around.model)
    found = Unplaced()
    stored: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    for name, (target, *_) in without.items():
        leaf = target.rpartition(".")[2]
        tensor = around.stored.get(name)
        if (
            leaf in _COMPUTED
            or target in computed
            or (ignored(target) and tensor is not None and not tensor.is_floating_point())
        ):
            found.left_out[name] = f"{around.kind} computes it"
        elif (
            leaf == "bias"
            and _owner(around, modules, target) is not None
            and not bool((around.unread[name][1] if tensor is None else tensor).any())
        ):
            found.left_out[name] = f"a bias of zeros, which {around.kind} does not have"
        elif tensor is None:
            unread.setdefault(_part(around, modules, name, target, ignored), []).append(name)
            found.left_out[name] = f"its dtype is {around.unread[name][0]}, which slimlm does not read"
        else:
            stored.setdefault(_part(around, modules, name, target, ignored), []).append(name)
            found.stored[name] = tensor
    for first, second in twice:
        if second in around.unread or not _alike(around.stored[first], around.stored[second]):
            raise ModelError(
                f"the files of {around.source} hold both {first} and {second} for one tensor of {around.kind}, and they "
                "differ; remove the one that is wrong"
            )
        found.left_out[second] = f"the same as {first}"
    return Unplaced(found.stored, found.left_out, _message(around, stored, unread, found.bytes))


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _part(
    around: Surroundings, modules: Mapping[str, nn.Module], name: str, target: str, ignored: Callable[[str], bool]
) -> str:
    """Which part of the files a tensor belongs to that the class does not have; ModelError where it lies inside the class."""
    if (beyond := _block_beyond(around, target)) is not None:
        number, count = beyond
        if number < count + _declared(around.config) or ignored(target):
            return _FURTHER
        raise ModelError(_more_blocks(around, name, number + 1, count))
    if ignored(target):
        return _FURTHER if "mtp" in target else _outermost(around, target)
    if (owner := _owner(around, modules, target)) is not None:
        raise ModelError(
            f"the files of {around.source} hold {name}, and {owner} of {around.kind} has no such tensor: the class would not "
            "compute what the files were made for. Another version of transformers, or a config.json that fits, may know it; "
            "or remove that tensor from the files if the model does not need it"
        )
    named = _architecture(around.config)
    if any(word in named for word in _NO_LANGUAGE_MODELS):
        raise ModelError(_no_language_model(around, named, name))
    return _FURTHER if re.match(r"(\w+\.)?mtp\b", target) else _outermost(around, target)


def _owner(around: Surroundings, modules: Mapping[str, nn.Module], target: str) -> str | None:
    """The innermost module of the class that a tensor lies in; None where that is the whole model or its list of blocks."""
    found = max((own for own in _prefixes(target) if own in modules), key=len, default="")
    outside = ("", around.model.base_model_prefix)
    return None if found in outside or _block_beyond(around, target) is not None else found


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _outermost(around: Surroundings, target: str) -> str:
    base = f"{around.model.base_model_prefix}."
    return target.removeprefix(base).partition(".")[0]


def _ignored_by(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether the class itself passes over a name that it has no place for."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _block_beyond(around: Surroundings, target: str) -> tuple[int, int] | None:
    """The number of the block that a tensor is in, and the number of blocks; None where it is in none beyond these."""
    stack, count = around.stack
    found = re.match(rf"{re.escape(stack)}\.(\d+)\.", target)
    return (int(found[1]), count) if found and int(found[1]) >= count else None


def _declared(config: Mapping[str, Any]) -> int:
    """The number of multi-token prediction layers that a config declares."""
    inner = config.get("text_config")
    counts = [0]
    for each in (config, inner if isinstance(inner, dict) else {}):
        counts += [
            value
            for key, value in each.items()
            if isinstance(value, int) and ("nextn" in key or "mtp" in key) and ("layers" in key or "modules" in key)
        ]
    return max(counts)


def _more_blocks(around: Surroundings, name: str, held: int, count: int) -> str:
    return (
        f"the files of {around.source} hold {held} blocks or more ({name}), and {around.kind} has {count} by the config. "
        f"If the model has {held} blocks, set num_hidden_layers to {held} in config.json; if the last ones predict further "
        f"tokens, declare them there (num_nextn_predict_layers = {held - count}); if they are meant to be cut off, save the "
        "model without them: model.save_pretrained(folder)"
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _no_language_model(around: Surroundings, named: str, head: str) -> str:
    return (
        f"{around.source} is no language model: config.json says {named} (a reward model or classifier), and the files hold "
        f"its head, {head}, which {around.kind} does not have. slimlm compresses causal language models"
    )


def _message(around: Surroundings, stored: Mapping[str, list[str]], unread: Mapping[str, list[str]], size: int) -> str | None:
    """What the user should know, by the parts of the files that the tensors belong to; None where there is nothing.

    Args:
        around: the model and its files.
        stored: names of tensors that are stored as they are, `size` bytes in all.
        unread: names of tensors that are left out because slimlm does not read their dtypes.
        size: bytes.
    """
    found = []
    if stored:
        found.append(
            f"{_count(stored)} tensors of the files ({size / 1e6:.2f} MB) have no place in {around.kind}: {_parts(stored)}. "
            "They are not compressed, but stored with the checkpoint as they are"
        )
    if unread:
        dtypes = sorted({around.unread[name][0] for names in unread.values() for name in names})
        found.append(
            f"{_count(unread)} tensors of the files have no place in {around.kind} and will not be in the checkpoint, because "
            f"slimlm does not read their dtypes ({', '.join(dtypes)}): {_parts(unread)}"
        )
    return ". ".join(found) or None


def _count(names: Mapping[str, list[str]]) -> int:
    return sum(map(len, names.values()))


def _parts(parts: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(names)} of {part} ({_first_of(names)})" for part, names in parts.items())


def _first_of(names: list[str]) -> str:
    return ", ".join([*names[:_NAMED], *(["..."] if len(names) > _NAMED else [])])


def refuse_quantized_tensors(around: Surroundings, names: Iterable[str]) -> None:
    """Raise ModelError where tensors of the files are what a format of quantized weights, or an adapter, stores for a layer."""
    modules = dict(around.model.named_modules())
    for name in names:
        owner, _, leaf = name.rpartition(".")
        parts = name.split(".")
        if any(part.startswith("lora_") or part in ("base_layer", "modules_to_save") for part in parts):
            raise ModelError(
                f"the files of {around.source} hold an adapter that is not merged ({name}). Merge it first: with peft, "
                "model.merge_and_unload().save_pretrained(folder)"
            )
        if leaf not in _QUANTIZED and not leaf.endswith(("_scale", "_scale_inv", "_zero_point")):
            continue
        layer = name.partition(".weight.")[0] if ".weight." in name else owner
        if any(known == layer or known.endswith(f".{layer}") or layer.endswith(f".{known}") for known in modules if known):
            raise ModelError(
                f"{around.source} is already quantized: its files hold {name}, which belongs to the codes of {layer}. slimlm "
                "starts from the original weights, in 16 or 32 bits"
            )


def refuse_integers(around: Surroundings, targets: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raise ModelError where the files hold integers for a tensor that is floating-point in the class.

    Args:
        around: the model and its files.
        targets: names in the model, and the names in the files of what each is made of.
    """
    state = around.model.state_dict()
    for target, names in targets:
        for name in names:
            tensor = around.stored[name]
            if state[target].is_floating_point() and not tensor.is_floating_point():
                scales = [n for n in around.stored if n != name and n.startswith(name.removesuffix("weight")) and "scale" in n]
                scale = f", with {scales[0]}" if scales else ""
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ModelError(
                    f"the files of {around.source} hold {name} as {dtype}{scale}, and {around.kind} computes with "
                    "floating-point numbers there: these are codes of a quantized model, not weights. slimlm starts from the "
                    "original weights, in 16 or 32 bits"
                )


def refuse_missing(around: Surroundings, lost: Iterable[str], without: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ModelError where tensors of the class are not in the files; the message is about what is there instead.

    Args:
        around: the model and its files.
        lost: the names in the model of the tensors that were not found.
        without: the names in the files of the tensors that have no place there, with those that transformers looks for.
    """
    missing = sorted(lost)
    if not missing:
        return
    lacks = f"{around.source} lacks {len(missing)} tensors that {around.kind} needs, {missing[0]} among them"
    named, unknown = _architecture(around.config), list(without)
    state = around.model.state_dict()
    wrapped = [name for name in unknown if _unwrapped(name) != name and _unwrapped(name) in state]
    if wrapped:
        raise ModelError(
            f"{lacks}; the files name their tensors as a program does that wraps the model ({wrapped[0]} for "
            f"{_unwrapped(wrapped[0])}). Save the model itself: model.module.save_pretrained(folder) after "
            "DistributedDataParallel or DeepSpeed, model._orig_mod.save_pretrained(folder) after torch.compile; or rename the "
            "tensors in the files"
        )
    if 2 * len(missing) > len(state) and named.endswith(_MULTIMODAL) and named != around.kind:
        found = next((name for name in unknown if name.endswith(f".{missing[0]}")), None)
        instead = f" ({found} for {missing[0]})" if found else ""
        raise ModelError(
            f"{lacks}: config.json names {named}, a model of more than text, and the files name the tensors of its language "
            f"model in another way{instead}. slimlm compresses causal language models: save the language model in it by "
            "itself (save_pretrained), and give that folder"
        )
    if (prefix := _prefix(unknown, state)) is not None:
        raise ModelError(
            f"{lacks}; the files name their tensors with {prefix!r} in front ({unknown[0]}). Rename them, or save the inner "
            "model with save_pretrained"
        )
    head = around.model.get_output_embeddings()
    if head is not None and all(name.startswith(_name_of(around.model, head)) for name in missing):
        if unknown and any(word in named for word in _NO_LANGUAGE_MODELS):
            raise ModelError(_no_language_model(around, named, unknown[0]))
        raise ModelError(
            f"{lacks}, and nothing else: the files hold a model without the head that predicts tokens"
            f"{f' ({named})' if named else ''}, as models for embeddings, rewards or classes do, or one whose head is tied to "
            "the embedding, which tie_word_embeddings = true in config.json would say. slimlm compresses causal language models"
        )
    if unknown:
        raise ModelError(
            f"{lacks}; transformers would fill them with random numbers. The files hold {len(unknown)} tensors of other names "
            f"instead, such as {unknown[0]}: config and weights belong to different models, or the weights were saved in the "
            "format of another program; convert them to what save_pretrained writes"
        )
    raise ModelError(f"{lacks}; transformers would fill them with random numbers. Download the model again")


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(unknown: list[str], state: Mapping[str, Tensor]) -> str | None:
    """What stands before the names of the class in most of these names; None where there is no such prefix."""
    for name in unknown[:1]:
        for prefix in _prefixes(name):
            known = [n for n in unknown if n.startswith(f"{prefix}.") and n.removeprefix(f"{prefix}.") in state]
            if 2 * len(known) > len(unknown):
                return f"{prefix}."
    return None


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
