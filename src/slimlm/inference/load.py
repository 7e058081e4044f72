"""Open a checkpoint as a transformers model with `CompressedLinear` inside.

`load` maps the weight files, and every tensor of the model that needs no cast is a view of them, so that memory holds no copies
and only pages that were read, which the system can drop again. (`AutoModelForCausalLM.from_pretrained(folder)` works, too; its
use of memory is up to transformers. See hf_quantizer.py.)
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.core import arguments
from slimlm.core.defaults import usual_defaults
from slimlm.core.errors import CheckpointError, KernelError, SlimlmError
from slimlm.core.parts.fields import Json, dtype_name
from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry, TensorEntry
from slimlm.events import Notify, logged
from slimlm.inference.compressed_model import Origin, become_compressed
from slimlm.models.meta import meta_model, misfits
from slimlm.models.opening import fetch, loading_settings, open_generation_config, quantization_of, read_config
from slimlm.models.outputs import name_outputs
from slimlm.models.structure import swap
from slimlm.runtime.arguments import device as device_of
from slimlm.runtime.backends import cpu
from slimlm.runtime.cpu.bindings import LAYOUT, is_valid
from slimlm.runtime.dense import widen_activations
from slimlm.runtime.dispatch import uses_cpu_kernels
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import packed_layers, unpacking_reason, use_kernels
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description, parse_description
from slimlm.storage.kernel_cache import load_or_pack
from slimlm.storage.mapping import MappedFiles

Release = Callable[[Iterable[Tensor]], int]
"""Drops the memory pages of those of these tensors that are views of a file, and gives the bytes that were dropped."""


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    kernels: Kernels = "auto",
    keep: bool = True,
    mmap: bool = True,
    notify: Notify = logged,
) -> PreTrainedModel:
    """Open a compressed model on a device.

    On the CPU its tensors are views of the weight files; only tensors outside the compressed layers for which another dtype was
    asked are copies. While the model is in use these files may be replaced by a rename or removed, but not written to or cut
    short in place: the system ends a process that reads a part of a mapped file which is gone (SIGBUS). Give `mmap=False` where
    that can happen, as on a network disk.

    Kernels pack the layers again, one at a time. On the CPU the memory pages of their stored tensors are dropped, and with
    `keep` the packed layers are written to the checkpoint's folder and mapped by the next `load`; a GPU holds only the packed
    layers, and the stored tensors stay views of the files, on the CPU.

    Args:
        source: folder or hub name of a checkpoint.
        dtype: of activations and of what is not compressed. "auto" is, with CPU kernels, float32 activations among weights in
            the 16 bits that they are stored in (runtime/dense.py); with the reference, or where there are no kernels, the
            original's dtype.
        device: the CPU or a GPU.
        kernels: the arithmetic of products: "precise" (CPU kernels, activations in 16-bit integers), "fast" (8-bit), "gpu" (GPU
            kernels), "reference" (dense matrices), or "auto": precise kernels on the CPU and GPU kernels on a GPU for every
            layer that they take, the reference for others. For float32 activations on a GPU, for which its kernels unpack
            weights at every product, "auto" is the reference, too, where dense matrices take up to half of the free memory
            there. `slimlm.use_kernels` selects again later.
        keep: whether to write layers that the CPU kernels packed to the checkpoint's folder.
        mmap: whether tensors are views of the files. Otherwise all are copied into memory, and no file is used afterwards.
        notify: a function that is given messages for the user, such as which layers no kernel takes, and why; without one
            they are warnings of the logger "slimlm".

    Raises:
        CheckpointError: the checkpoint is damaged, incomplete or newer than this version. The files' sizes and headers are
            checked, not their checksums: `slimlm.verify` does that.
        KernelError: kernels that were asked for by name do not take some layer.
        SlimlmError: there is no such GPU, dtype or folder.
    """
    folder, where = arguments.model_source(source, "source"), device_of(device)
    _refuse_unknown(dtype)
    arguments.one_of(kernels, "kernels", get_args(Kernels), KernelError)
    arguments.flag(keep, "keep")
    arguments.flag(mmap, "mmap")
    arguments.function(notify, "notify", "each message for the user")
    if isinstance(source, Path) and not source.exists():
        raise CheckpointError(f"there is no folder {source}")
    with _OPENING, usual_defaults():
        return _load(folder, dtype, where, kernels, keep=keep, mmap=mmap, notify=notify)


_OPENING = RLock()
"""Held while a model is opened: transformers changes settings of the whole process meanwhile, such as the default dtype."""


_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes in which a model can be opened."""


def _refuse_unknown(dtype: torch.dtype | str) -> None:
    """Raise SlimlmError where a model cannot be opened in this dtype."""
    name, choices = str(dtype).removeprefix("torch."), ", ".join(_DTYPES)
    if dtype != "auto" and name not in _DTYPES:
        raise SlimlmError(f'`dtype={name!r}`: activations are floating-point numbers; give "auto" or one of {choices}')


def _load(
    source: str,
    dtype: torch.dtype | str,
    where: torch.device,
    kernels: Kernels,
    *,
    keep: bool,
    mmap: bool,
    notify: Notify,
) -> PreTrainedModel:
    """`load` with arguments that were checked."""
    refuse_other(source)
    try:
        folder = fetch(source)
        about = read_description(folder)
        origin = Origin.of(folder)
        files = MappedFiles.of(checkpoint.check_files(folder))
        stored, release = dict(files.tensors), files.release
        if not mmap:
            stored = {name: tensor.clone() for name, tensor in stored.items()}
        packed = {name: take(stored, name, entry.tensors) for name, entry in about.own().items()}
        all_of_them = {f"{n}.{key}": t for n, own in packed.items() for key, t in own.items()} | stored
        take_others(stored, about)
        empty = meta_model(folder, all_of_them, about.experts)
        if wrong := next(misfits(empty, about, stored), None):
            raise CheckpointError(f"{source} does not fit its own description: {wrong}")
        model, info = _filled(folder, empty, about, packed, _widened(stored, dtype, release), dtype)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be opened: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(f"{source} does not fit its own description: {kind} {sorted(map(str, info[kind]))[:3]}")
    become_compressed(model, origin)
    model.name_or_path = model.config.name_or_path = source
    model.eval().requires_grad_(False)
    if where.type != "cpu":
        model.to(where)
        release(stored.values())
        release(tensor for tensors in packed.values() for tensor in tensors.values())
    elif dtype == "auto" and uses_cpu_kernels(kernels):
        widen_activations(model)
        model.config.dtype = model.dtype
    if kernels != "reference":
        _pack(model, kernels, _Stored(folder, packed, release), keep=keep, mmap=mmap, notify=notify)
    return model


def refuse_other(source: str) -> None:
    """Check that a folder or hub name is a checkpoint of slimlm.

    Raises:
        CheckpointError: it is none, or one of a newer version.
    """
    about = quantization_of(read_config(source), source)
    if about.get("quant_method") != checkpoint.METHOD:
        raise CheckpointError(
            f"{source} is not a slimlm checkpoint (quant_method: {about.get('quant_method') or 'none'}); compress it first "
            "with 'slimlm compress', or open a dense model with transformers"
        )
    checkpoint.check_format(about.get("format"), source)


def read_description(folder: Path) -> Description:
    """The entries of the layers and embeddings of a checkpoint's folder.

    Raises:
        CheckpointError: it is malformed.
    """
    return parse_description(quantization_of(read_config(str(folder)), str(folder)), folder)


def take(stored: dict[str, Tensor], layer: str, described: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Remove a layer's or embedding's tensors from those stored and return them.

    Args:
        stored: all tensors `[...]` by full name.
        layer: the module's full name.
        described: dtype and shape of its tensors by name.

    Raises:
        CheckpointError: a tensor is missing or not as described.
    """
    found = {}
    for name, wanted in described.items():
        tensor = stored.pop(f"{layer}.{name}", None)
        if tensor is None or TensorEntry.of(tensor) != wanted:
            kind = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            expected = f"{dtype_name(wanted.dtype)} {list(wanted.shape)}"
            raise CheckpointError(f"{layer}.{name} should be {expected}, but {kind} is stored; the checkpoint is damaged")
        found[name] = tensor
    return found


def take_others(stored: dict[str, Tensor], about: Description) -> None:
    """Remove the tensors `[...]` for which the model's class has no place from those stored.

    Raises:
        CheckpointError: one of them is missing.
    """
    for name in about.others:
        if stored.pop(name, None) is None:
            raise CheckpointError(f"{name} is missing: the config lists it, and nothing is stored under that name")


def _widened(stored: dict[str, Tensor], dtype: torch.dtype | str, release: Release) -> dict[str, Tensor]:
    """The tensors in the wider dtype that was asked for, cast one by one.

    Transformers would cast them, too, but several at a time, with the originals in memory meanwhile. A cast to a wider dtype
    changes no value; a cast to a narrower one is left to transformers, which knows what a model keeps wide.
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
    """The model that a folder's config describes, made of these tensors, and what transformers reports of the others.

    Transformers takes tensors in place of files only from a model's own class, which is that of the empty model. It spends a
    millisecond on each tensor, of which compressed layers have several: it is given layers with one, `weight`, which the
    initialization of some models reads.
    """
    config, described = empty.config, dict(empty.config.quantization_config)
    short = {"layers": _short(about.layers), "embeddings": _short(about.embeddings)}
    config.quantization_config = {**described, **short}
    given = {**others, **{f"{name}.weight": tensors["weight"] for name, tensors in packed.items()}}
    with loading_settings():
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
    model.generation_config = open_generation_config(folder)
    name_outputs(model)
    return model, info


def _short(entries: Mapping[str, LayerEntry] | Mapping[str, EmbeddingEntry]) -> dict[str, Json]:
    """The entries of layers or embeddings with one tensor each."""
    return {name: replace(entry, tensors={"weight": entry.tensors["weight"]}).to_json() for name, entry in entries.items()}


@dataclass(frozen=True)
class _Stored:
    """A checkpoint's packed tensors."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    """Those of each layer, of any shapes `[...]`, as the files have them; they replace their copies on a GPU."""
    release: Release


def _pack(model: PreTrainedModel, kernels: Kernels, stored: _Stored, *, keep: bool, mmap: bool, notify: Notify) -> None:
    """Select the backend of each layer, report which layers no kernel takes, and pack the others."""
    use_kernels(model, kernels)
    layers = packed_layers(model)
    reasons = {name: layer.selection().refused for name, layer in layers.items()}
    for reason in sorted({reason for reason in reasons.values() if reason is not None}):
        names = [name for name, own in reasons.items() if own == reason]
        notify(f"{len(names)} of {len(layers)} layers, {names[0]} among them, run without kernels: {reason}")
    if (unpacked := unpacking_reason(model)) is not None:
        notify(unpacked)
    for name, layer in layers.items():
        if layer.selection().backend.name == "gpu":
            layer.prepare()
            # At once, so that the GPU holds the stored tensors of the layers to come and no others. A tied head has none.
            if name in stored.tensors and isinstance(layer, CompressedLinear):
                layer.offload(stored.tensors[name])
    on_cpu = [name for name, layer in layers.items() if layer.selection().backend.name == "cpu"]
    if not on_cpu:
        return

    def make(name: str) -> Tensor:
        own = layers[name].stored()
        packed = cpu.pack(own)
        stored.release(own.tensors.values())
        return packed

    if keep:
        blobs = load_or_pack(stored.folder, LAYOUT, checkpoint.fingerprint(stored.folder), on_cpu, make, is_valid, notify)
        if not mmap:
            blobs = {name: blob.clone() for name, blob in blobs.items()}
    else:
        blobs = {name: make(name) for name in on_cpu}
    # Again for all: pages that two layers share were not dropped above.
    stored.release(tensor for name in on_cpu for tensor in layers[name].stored().tensors.values())
    for name in on_cpu:
        layers[name].adopt(blobs[name])
        layers[name].prepare()
