"""An opened model written as a checkpoint again, from what its modules hold now.

Packed tensors are written as they are. Tensors outside packed layers that were cast to a wider dtype when the model was opened
are written in the dtype that was stored, if that changes no value. The record of the run is carried along: it keeps its figures
per layer and notes which tensors are no longer those of the run. What would not open or not verify is refused beforehand.
"""

import inspect
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from slimlm.core import arguments
from slimlm.core.errors import CheckpointError
from slimlm.core.parts.base import not_finite
from slimlm.core.parts.fields import dtype_name
from slimlm.core.parts.pack import TensorEntry
from slimlm.inference.compressed_model import CompressedModel, Origin
from slimlm.models.experts import Experts
from slimlm.record import LEFT_OUT, READ
from slimlm.runtime.whole_model import packed_modules
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description
from slimlm.storage.mapping import MappedFiles
from slimlm.storage.replacing import refuse_other_contents, replacing
from slimlm.storage.streams import is_plain_name, sha256_of, tensor_sum

_UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
"""Arguments of `push_to_hub`, which `save_pretrained` takes, too."""
_NO_MATTER = ("safe_serialization", "save_function")
"""Arguments of transformers' earlier versions, which Trainer and accelerate's users still give."""


@dataclass(frozen=True)
class Wanted:
    """What a call of `save_pretrained` asks for."""

    folder: Path
    """The folder to write."""
    here: bool
    """Whether this process writes (`is_main_process`)."""
    given: Mapping[str, Tensor] | None
    """The tensors to write in place of the model's own, by name (`state_dict`)."""
    shard: int | str
    """The most that a weight file holds, in bytes or such as "5GB" (`max_shard_size`)."""
    push: dict[str, Any] | None
    """The arguments of an upload after writing; None: there is none."""
    refused: str | None
    """Why what is asked for cannot be written; None: it can."""

    @classmethod
    def of(cls, call: inspect.BoundArguments) -> "Wanted":
        """Read the arguments of a call, which are those of transformers."""
        call.apply_defaults()
        named: dict[str, Any] = {**call.arguments, **call.arguments.get("kwargs", {})}
        folder, upload = arguments.path(named["save_directory"], "save_directory"), named.get("push_to_hub")
        push = {key: named[key] for key in _UPLOAD if named.get(key) is not None}
        refused = None
        if unknown := sorted(set(call.arguments.get("kwargs", {})) - {*_UPLOAD, *_NO_MATTER}):
            refused = f"`{unknown[0]}={named[unknown[0]]!r}`: save_pretrained has no such argument; leave it out"
        elif named.get("variant") is not None:
            refused = f"`variant={named['variant']!r}`: a checkpoint has one set of weights; leave it out"
        elif named.get("safe_serialization") is False:
            refused = "`safe_serialization=False`: a checkpoint's weights are safetensors files; leave it out"
        elif named.get("save_original_format") is False:
            refused = "`save_original_format=False`: a checkpoint has one format; leave it out"
        elif named.get("distributed_checkpoint"):
            refused = "`distributed_checkpoint=True`: a checkpoint is written by one process; leave it out"
        return cls(
            folder,
            bool(named["is_main_process"]),
            named["state_dict"],
            named["max_shard_size"],
            {"repo_id": folder.name, **push} if upload else None,
            refused,
        )


def refuse_saving(model: CompressedModel, wanted: Wanted | None = None) -> Origin:
    """Where a model was opened from; raises CheckpointError where it cannot be saved, or not as it is wanted."""
    kind = type(model).__name__
    if not isinstance(model, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), ())):
        raise CheckpointError(
            f"a {kind} cannot be saved: a checkpoint is a whole causal language model, and this one lacks tensors of it. Open "
            "it with `slimlm.load` or AutoModelForCausalLM and save that, or copy the checkpoint's folder"
        )
    if model.origin is None:
        raise CheckpointError(
            f"this {kind} cannot be saved: it was opened from files without {checkpoint.RECORD}, which says how the model was "
            "compressed. Open it with `slimlm.load`, which fetches that file from the hub, too"
        )
    if wanted is not None:
        if wanted.refused is not None:
            raise CheckpointError(f"{wanted.folder} cannot be written: {wanted.refused}")
        refuse_other_contents(wanted.folder)
    return model.origin


def save(model: CompressedModel, origin: Origin, wanted: Wanted) -> None:
    """Write an opened model as a checkpoint.

    Raises:
        CheckpointError: its tensors would make no sound checkpoint, or the disk refuses.
    """
    description = _described(model, origin)
    tensors = _tensors(model, wanted.given, origin)
    _refuse_unsound(tensors, description, origin)
    tensors |= _others(origin)
    same = all(tensor.dtype == origin.dtypes.get(name, tensor.dtype) for name, tensor in tensors.items())
    dtype = origin.dtype if same and origin.dtype is not None else dtype_name(model.dtype)
    with replacing(wanted.folder) as partial:
        model.config.save_pretrained(partial)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config = {**config, "architectures": [type(model).__name__], "dtype": dtype}
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        _copy_others(origin, wanted.folder, partial)
        files = checkpoint.write_weights(partial, tensors, shard_bytes=wanted.shard)
        checkpoint.write_config(partial, config, description)
        checkpoint.write_record(partial, _record(origin, description, files, partial), files)


def _described(model: PreTrainedModel, origin: Origin) -> Description:
    """The entries of the packed modules that a model holds now, and the tensors that it has no place for."""
    layers, embeddings = packed_modules(model)
    experts = tuple(name for name, module in model.named_modules() if isinstance(module, Experts))
    return Description(layers, embeddings, experts, origin.others)


def _others(origin: Origin) -> dict[str, Tensor]:
    """The tensors, of any shapes `[...]`, that no model holds; raises CheckpointError where the original has them no longer."""
    if not origin.others:
        return {}
    recorded = _sums(entry for entry in origin.record.get("files", {}).values() if "tensors" in entry)
    try:
        stored = MappedFiles.of(checkpoint.check_files(origin.folder)).tensors
        found = {name: stored[name] for name in origin.others}
    except (CheckpointError, OSError, KeyError):
        found = {}
    changed = [name for name in origin.others if name not in found or recorded.get(name) != tensor_sum(found[name])]
    if changed:
        raise CheckpointError(
            f"{changed[0]} is a tensor that no class of transformers has a place for, so it is copied when a model is saved; "
            f"{origin.folder}, which the model was opened from, no longer holds it"
        )
    return found


def _tensors(model: PreTrainedModel, given: Mapping[str, Tensor] | None, origin: Origin) -> dict[str, Tensor]:
    """The tensors to write by name, of any shapes `[...]`: the model's own, or those given for them; of tied ones the first."""
    own = model.state_dict(keep_vars=True)
    source = own if given is None else given
    if unknown := sorted(set(source) - set(own)):
        raise CheckpointError(f"`state_dict` holds {unknown[0]}, which {type(model).__name__} has not")
    first: dict[int, str] = {}
    kept = [name for name, tensor in own.items() if first.setdefault(id(tensor), name) == name]
    if lacking := sorted(set(kept) - set(source)):
        raise CheckpointError(f"`state_dict` lacks {len(lacking)} of the model's tensors, {lacking[0]} among them")
    found = {}
    for name in kept:
        tensor = source[name].detach()
        if tensor.is_meta:
            # Layers that accelerate keeps on the disk, or has not loaded.
            tensor = load_offloaded_parameter(model, name)
        found[name] = _as_stored(tensor, origin.dtypes.get(name, tensor.dtype))
    return found


def _as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor `[...]` in the narrower dtype in which it was stored, where that changes no value; else as it is."""
    if tensor.dtype == dtype or not tensor.is_floating_point() or torch.promote_types(tensor.dtype, dtype) != tensor.dtype:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _refuse_unsound(tensors: dict[str, Tensor], description: Description, origin: Origin) -> None:
    """Raise CheckpointError where a packed tensor is not as described or holds values that packing never gives."""
    recorded = {row["name"] for kind in ("layers", "embeddings") for row in origin.record.get(kind, ())}
    rest = dict(tensors)
    for name, entry in description.own().items():
        if name not in recorded:
            raise CheckpointError(f"{name} is packed, and {origin.folder / checkpoint.RECORD} says nothing of it")
        own = {key: rest.pop(f"{name}.{key}").cpu() for key in entry.tensors}
        for key, tensor in own.items():
            if TensorEntry.of(tensor) != entry.tensors[key]:
                raise CheckpointError(
                    f"{name}.{key} is packed as {dtype_name(entry.tensors[key].dtype)} {list(entry.tensors[key].shape)}, and "
                    f"{tensor.dtype} {list(tensor.shape)} was to be written; packed tensors cannot be cast"
                )
        for problem in entry.parts.check(own, entry.shape):
            raise CheckpointError(f"{name} cannot be saved: {problem}")
    for name, tensor in rest.items():
        for problem in not_finite(name, tensor):
            raise CheckpointError(f"{problem}; a model with such a tensor cannot be saved")


def _copy_others(origin: Origin, out: Path, partial: Path) -> None:
    """Copy tokenizer files and the like into the new checkpoint: those of the output folder, or else the original's."""
    written = {"config.json", "generation_config.json", checkpoint.INDEX}
    recorded = origin.record.get("beside")
    for name, sha256 in (recorded if isinstance(recorded, dict) else {}).items():
        if name in written or not is_plain_name(name):
            continue
        own = origin.folder / name
        if (out / name).is_file():
            shutil.copyfile(out / name, partial / name)
        elif own.is_file() and sha256_of(own) == sha256:
            shutil.copyfile(own, partial / name)


def _record(origin: Origin, description: Description, files: checkpoint.Files, folder: Path) -> dict[str, Any]:
    """The record of the run, with the sizes of the files that were written and the names of tensors that are others now."""
    record = {key: value for key, value in origin.record.items() if key not in ("format", "files", "beside")}
    packed = description.own()
    replaced: dict[str, str] = {}
    for kind in ("layers", "embeddings"):
        rows = record.get(kind, [])
        record[kind] = [row for row in rows if row["name"] in packed]
        replaced |= {row["name"]: "replaced by a dense layer after the run" for row in rows if row["name"] not in packed}
    record["skipped"] = {**record.get("skipped", {}), **replaced}
    record["stored_bytes"] = sum(entry["bytes"] for entry in files.values())
    if isinstance(source := record.get("source"), dict):
        record["source"] = {**source, "files": {name: _now(folder / name, what) for name, what in source["files"].items()}}
    edited = set(record.get("edited", ())) | set(_changed(origin.record.get("files", {}), files))
    return {**record, "edited": sorted(edited)} if edited else record


def _now(file: Path, what: str) -> str:
    """What became of a file of the original's folder, now that the checkpoint is written again."""
    gone = what != READ and not what.startswith(LEFT_OUT) and not file.is_file()
    return f"{LEFT_OUT}the checkpoint that held it was gone when the model was saved again" if gone else what


def _changed(before: Mapping[str, Any], after: checkpoint.Files) -> Iterator[str]:
    """Tensors whose checksum is not the recorded one, or of which only one of the two has one."""
    if not all("tensors" in entry for entry in before.values()):
        return
    old, new = _sums(before.values()), _sums(after.values())
    yield from (name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _sums(files: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {name: sum_of for entry in files for name, sum_of in entry["tensors"].items()}
