"""Open a checkpoint as a transformers model with `CompressedLinear` inside.

`load` maps the weight files and makes every tensor of the model that needs no cast a view of them, so that memory holds
what was read and can be dropped again, and nothing twice. Importing this module also registers the format with
transformers, so that `AutoModelForCausalLM.from_pretrained(folder)` works after `import slimlm`; what that holds in
memory is up to transformers.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimlm.core.errors import CheckpointError, SlimlmError
from slimlm.core.parts.fields import Json, dtype_name
from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry, TensorEntry
from slimlm.models.experts import take_apart
from slimlm.models.meta import empty_model, misfits
from slimlm.models.opening import fetch, quantization_of, read_config, without_bars
from slimlm.models.structure import swap
from slimlm.runtime.backends import cpu
from slimlm.runtime.cpu.kernels import LAYOUT, whole
from slimlm.runtime.dense import widen_activations
from slimlm.runtime.dispatch import Kernels, available
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.gpu.device import absent
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import multipliers, unpacks, use_kernels
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description, parse_description
from slimlm.storage.kernel_cache import kept_or_made
from slimlm.storage.mapping import map_file

Tell = Callable[[str], None]
Release = Callable[[Iterable[Tensor]], int]
"""Drops the pages of those of these tensors that are views of a file; gives the bytes dropped."""


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    kernels: Kernels = "auto",
    keep: bool = True,
    tell: Tell = _warn,
) -> PreTrainedModel:
    """A compressed model from its folder (or a hub name), on a device.

    On the CPU its tensors are views of the weight files, so these must stay as they are while the model is in use; only tensors
    outside the compressed layers that another dtype was asked for are copies.

    kernels: who multiplies; "precise" (activations in 16-bit integers), "fast" (8-bit), "gpu", "reference" (dense matrices), or
    "auto": precise kernels on the CPU and GPU kernels on a GPU for every layer that they take, the reference for others. For
    float32 activations on a GPU, for which its kernels unpack weights at every product, "auto" is the reference, too, where
    dense matrices take up to half of the free memory there. The kernels' layers are packed anew, one at a time. On the CPU the
    pages of their stored tensors are dropped, and with `keep` the packed layers are written beside the checkpoint and mapped
    by the next load; on a GPU they are all that the card holds, and the stored tensors stay views of the files, on the CPU.
    `slimlm.use_kernels` chooses again later.
    dtype: of activations and of what is not compressed. "auto" is, with CPU kernels, float32 activations among weights in the
    16 bits that they are stored in (runtime/dense.py); with the reference, or where there are no kernels, the original's dtype.
    tell: hears what a user should know, such as which layers no kernel takes, and why.

    Raises CheckpointError for a damaged, incomplete or newer checkpoint, before or instead of handing out a model; the
    files' sizes and headers are checked, not their checksums: `slimlm inspect` does that. Raises KernelError where kernels
    asked for by name do not take some layer, and SlimlmError for a card that is not there.
    """
    source, where = str(source), torch.device(device)
    if (reason := absent(where)) is not None:
        raise SlimlmError(f'device = "{where}": {reason}; device="cpu" would do')
    refuse_other(source)
    try:
        folder = fetch(source)
        about = read_description(folder)
        files = [map_file(path) for path in checkpoint.check_files(folder)]

        def release(tensors: Iterable[Tensor]) -> int:
            wanted = list(tensors)
            return sum(file.release(wanted) for file in files)

        stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
        packed = {name: take(stored, name, entry.tensors) for name, entry in about.own().items()}
        all_of_them = {f"{n}.{key}": t for n, own in packed.items() for key, t in own.items()} | stored
        empty = empty_model(folder, all_of_them, about.experts)
        if wrong := next(misfits(empty, about, stored), None):
            raise CheckpointError(f"{source} does not fit its own description: {wrong}")
        model, info = _filled(folder, empty, about, packed, _widened(stored, dtype, release), dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be opened: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(f"{source} does not fit its own description: {kind} {sorted(map(str, info[kind]))[:3]}")
    model.name_or_path = model.config.name_or_path = source
    model.eval().requires_grad_(False)
    if where.type != "cpu":
        model.to(where)
        release(stored.values())
        release(tensor for tensors in packed.values() for tensor in tensors.values())
    elif dtype == "auto" and available(kernels):
        widen_activations(model)
    if kernels != "reference":
        _pack(model, kernels, folder, packed, release, keep=keep, tell=tell)
    return model


def refuse_other(source: str) -> None:
    """Raise CheckpointError where a folder or hub name is no checkpoint of slimlm's, or of a newer slimlm."""
    about = quantization_of(read_config(source), source)
    if about.get("quant_method") != checkpoint.METHOD:
        raise CheckpointError(
            f"{source} is not a slimlm checkpoint (quant_method: {about.get('quant_method') or 'none'}); compress it first "
            "with 'slimlm compress', or open a dense model with transformers"
        )
    checkpoint.check_format(about.get("format"), source)


def read_description(folder: Path) -> Description:
    """What a checkpoint's folder says of its layers; raises CheckpointError where that does not make sense."""
    return parse_description(quantization_of(read_config(str(folder)), str(folder)), folder)


def take(stored: dict[str, Tensor], layer: str, described: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Take a layer's or embedding's tensors out of those stored; raises CheckpointError where they are not as described."""
    found = {}
    for name, wanted in described.items():
        tensor = stored.pop(f"{layer}.{name}", None)
        if tensor is None or TensorEntry.of(tensor) != wanted:
            kind = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            told = f"{dtype_name(wanted.dtype)} {list(wanted.shape)}"
            raise CheckpointError(f"{layer}.{name} should be {told}, but {kind} is stored; the checkpoint is damaged")
        found[name] = tensor
    return found


def _widened(stored: dict[str, Tensor], dtype: torch.dtype | str, release: Release) -> dict[str, Tensor]:
    """The tensors in the wider dtype asked for, cast one by one.

    Transformers would cast them too, but several at a time, with the originals in memory meanwhile. A cast to a
    wider dtype changes no value; a narrower one is left to transformers, which knows what a model keeps wide.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype):
        return stored
    found = {}
    for name, tensor in stored.items():
        widens = tensor.is_floating_point() and torch.promote_types(tensor.dtype, wanted) == wanted != tensor.dtype
        found[name] = tensor.to(wanted) if widens else tensor
        if widens:
            release([tensor])
    return found


def _filled(
    folder: Path,
    empty: PreTrainedModel,
    about: Description,
    packed: dict[str, dict[str, Tensor]],
    others: dict[str, Tensor],
    dtype: torch.dtype | str,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that a folder's config describes, made of these tensors, and what transformers says of the others.

    Transformers takes tensors in place of files only from a model's own class, so the class is found by an empty model.
    It spends a millisecond on each tensor, of which compressed layers have several: it is given layers with one, `weight`,
    which the initialization of some models looks at.
    """
    config, described = empty.config, dict(empty.config.quantization_config)
    short = {"layers": _short(about.layers), "embeddings": _short(about.embeddings)}
    config.quantization_config = {**described, **short}
    given = {**others, **{f"{name}.weight": tensors["weight"] for name, tensors in packed.items()}}
    with without_bars():
        model, info = type(empty).from_pretrained(None, config=config, state_dict=given, dtype=dtype, output_loading_info=True)
    for name, embedding in about.embeddings.items():
        activations = model.get_submodule(name).activations
        new = CompressedEmbedding(embedding.shape, embedding.parts, packed[name], activations, factor=embedding.factor)
        swap(model, name, new)
    for name, layer in about.layers.items():
        bias = model.get_submodule(name).bias
        if layer.tied_to is not None:
            swap(model, name, TiedLinear(model.get_submodule(layer.tied_to), bias))
        else:
            swap(model, name, CompressedLinear(layer.shape, layer.parts, packed[name], bias))
    for config in (model.config.quantization_config, model.hf_quantizer.quantization_config):
        config.layers, config.embeddings = described["layers"], described.get("embeddings", {})
    model.generation_config = _generation_config(folder)
    return model, info


def _short(entries: Mapping[str, LayerEntry] | Mapping[str, EmbeddingEntry]) -> dict[str, Json]:
    """The entries of layers or embeddings with one tensor each."""
    return {name: replace(entry, tensors={"weight": entry.tensors["weight"]}).to_json() for name, entry in entries.items()}


def _generation_config(folder: Path) -> GenerationConfig:
    """As transformers finds it: in its own file, or else what the model's config says of generation."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _pack(
    model: PreTrainedModel,
    kernels: Kernels,
    folder: Path,
    stored: dict[str, dict[str, Tensor]],
    release: Release,
    *,
    keep: bool,
    tell: Tell,
) -> None:
    """Choose who multiplies each layer, tell which ones no kernel takes, and pack the others.

    stored: each layer's own tensors as the files have them, for which those on a card are given up.
    """
    use_kernels(model, kernels)
    layers = multipliers(model)
    reasons = {name: layer.choice().refused for name, layer in layers.items()}
    for reason in sorted({reason for reason in reasons.values() if reason is not None}):
        names = [name for name, own in reasons.items() if own == reason]
        tell(f"{len(names)} of {len(layers)} layers, {names[0]} among them, run without kernels: {reason}")
    if (unpacked := unpacks(model)) is not None:
        tell(unpacked)
    for name, layer in layers.items():
        if layer.choice().backend.name == "gpu":
            layer.prepare()
            # At once, so that the card holds the stored tensors of the layers to come and no others. A tied head has none.
            if name in stored and isinstance(layer, CompressedLinear):
                layer.rest(stored[name])
    taken = [name for name, layer in layers.items() if layer.choice().backend.name == "cpu"]
    if not taken:
        return

    def make(name: str) -> Tensor:
        stored = layers[name].stored()
        packed = cpu.pack(stored)
        release(stored.tensors.values())
        return packed

    if keep:
        blobs = kept_or_made(folder, LAYOUT, checkpoint.fingerprint(folder), taken, make, whole, tell)
    else:
        blobs = {name: make(name) for name in taken}
    # Once more for all: pages that two layers share were kept until now.
    release(tensor for name in taken for tensor in layers[name].stored().tensors.values())
    for name in taken:
        layers[name].adopt(blobs[name])
        layers[name].prepare()


class _CheckpointConfig(PreTrainedConfig):
    """Stands in config.json for the model's own type; gives that type's config back."""

    model_type = checkpoint.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = {**config_dict, "model_type": config_dict.get("slimlm_model_type")}
        own.pop("slimlm_model_type", None)
        return CONFIG_MAPPING[own["model_type"]].from_dict(own, **kwargs)


@register_quantization_config(checkpoint.METHOD)
class SlimlmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint."""

    def __init__(
        self,
        format: int = checkpoint.FORMAT,
        layers: dict[str, Any] | None = None,
        embeddings: dict[str, Any] | None = None,
        experts: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = checkpoint.METHOD
        self.format = format
        self.layers = layers or {}
        self.embeddings = embeddings or {}
        self.experts = experts or []
        checkpoint.check_format(format, "the checkpoint")


@register_quantizer(checkpoint.METHOD)
class SlimlmQuantizer(HfQuantizer):
    """Puts empty compressed modules into the skeleton of the model, for transformers to load the packed tensors into.

    Transformers ties parameters only; a head that is tied to a packed embedding is taken out of what it would tie.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for file in (kwargs.get("checkpoint_files") or [])[:1]:
            if (Path(file).parent / checkpoint.RECORD).is_file():
                checkpoint.check_files(Path(file).parent)
        for name in self.quantization_config.experts:
            take_apart(model, name)
        for name, about in self.quantization_config.embeddings.items():
            embedding = EmbeddingEntry.parse(about)
            swap(model, name, CompressedEmbedding.empty(embedding, model.get_submodule(name).weight.dtype))
        for name, about in self.quantization_config.layers.items():
            entry = LayerEntry.parse(about)
            layer = CompressedLinear.empty(entry)
            if entry.tied_to is not None:
                layer = TiedLinear(model.get_submodule(entry.tied_to), layer.bias)
            layer.kernels = "auto"
            swap(model, name, layer)
        if self.quantization_config.embeddings:
            _leave_untied(model, {*self.quantization_config.layers, *self.quantization_config.embeddings})
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The packed tensors are frozen."""
        return False


def _leave_untied(model: PreTrainedModel, packed: set[str]) -> None:
    """Let transformers tie no parameter of these modules in this model: not now, and not by `tie_weights` later."""

    def others(pairs: Any) -> Any:
        return {a: b for a, b in pairs.items() if not {a.rpartition(".")[0], b.rpartition(".")[0]} & packed}

    model.all_tied_weights_keys = others(model.all_tied_weights_keys)
    model._tied_weights_keys = model.all_tied_weights_keys


AutoConfig.register(checkpoint.MODEL_TYPE, _CheckpointConfig)
