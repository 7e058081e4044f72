"""A dense model, its config and its tokenizer, opened from a folder or the hub; code that comes with a model is never run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from slimlm.core.errors import ModelError, first_line
from slimlm.hub import can_be_model, unreachable
from slimlm.models.experts import fused_in, take_apart

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class DenseModel:
    """A model in float32 on the CPU, with its stored dtypes and config, so that it can be written back unchanged."""

    source: str
    folder: Path
    """where its files are: the folder given, or the hub's cache"""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    dtypes: dict[str, torch.dtype]
    """of every tensor as stored, by name; casting back gives the stored values bit for bit"""
    bytes: int
    """size of its tensors as stored; tied tensors count once"""
    config: dict[str, Any]
    """as it is to be written with a checkpoint"""
    experts: list[str]
    """the names of the modules whose experts were taken apart into linear layers"""


def read_config(source: str) -> dict[str, Any]:
    """A model's config, unchanged from its file.

    Args:
        source: a folder, or a name on the hub.

    Raises:
        ModelError: there is no config, or it is damaged.
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{source} is a folder without config.json; give a model folder or a hub name")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not JSON ({error}); the download may be damaged") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} holds no JSON object; the download may be damaged")
        return config
    if folder.exists() or source.startswith((".", "/", "~")):
        raise ModelError(f"no model folder at {source}")
    if not can_be_model(source):
        raise ModelError(
            f"{source!r} is neither a folder here nor a name that a model on the hub can have (OWNER/NAME). "
            "Give the path of a downloaded model folder, or check the name"
        )
    silent = unreachable()
    try:
        # Unchanged from the file: whether transformers has its class is checked later, with a better message.
        config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=silent is not None)
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(
            f"{source!r} is neither a folder here nor a model that the hub gave ({silent or first_line(error)}). "
            "Give the path of a downloaded model folder, or check the name and the network"
        ) from error
    return dict(config)


def folder_of(source: str) -> Path:
    """The folder that holds a model's files: the one given, or the hub's cache, where the model was loaded from the hub."""
    path = Path(source)
    return path if path.is_dir() else Path(snapshot_download(source, local_files_only=True))


def fetch(source: str) -> Path:
    """The folder that holds a model's config and safetensors files; missing files of a name on the hub are downloaded."""
    path = Path(source)
    return path if path.is_dir() else Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))


def weights_folder(source: str) -> Path:
    """The folder that holds a model's config and weights; missing files of a name on the hub are downloaded.

    Old .bin files are downloaded only where there are no safetensors files.

    Raises:
        ModelError: the hub does not give the files.
    """
    path = Path(source)
    if path.is_dir():
        return path
    try:
        folder = fetch(source)
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(f"the hub does not give the files of {source!r} ({first_line(error)}); check the network") from error
    return folder


def open_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None where it has no tokenizer files.

    Raises:
        ModelError: the tokenizer files cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        folder = folder_of(source)
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        raise ModelError(f"the tokenizer of {source} cannot be opened: {first_line(error)}") from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within this context transformers shows no progress bars; slimlm reports its progress itself."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def open_dense(source: str) -> DenseModel:
    """Load a causal language model in float32; code that comes with it is never run.

    Args:
        source: a folder, or a name on the hub.

    Raises:
        ModelError: the model is missing, damaged, incomplete or already quantized.
    """
    config = read_config(source)
    refuse_quantized(config, source)
    refuse_foreign_code(config, source)
    try:
        with without_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
            folder = folder_of(source)
            dtypes = _stored_dtypes(folder, model) or _guessed_dtypes(source)
    except SafetensorError as error:
        raise ModelError(f"a weight file of {source} is damaged or cut short ({error}); download it again") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source} cannot be opened as a causal language model: {first_line(error)}") from error
    refuse_missing(info, source, type(model).__name__)
    size = sum({t.data_ptr(): t.numel() * dtypes[name].itemsize for name, t in model.state_dict().items()}.values())
    model = model.eval().requires_grad_(False)
    experts = fused_in(model)
    for name in experts:
        dtypes |= {weight: dtypes[share.fused] for weight, share in take_apart(model, name).items()}
    dtypes = {name: dtypes[name] for name in model.state_dict()}
    config = config_to_write(folder, model)
    return DenseModel(source, folder, model, open_tokenizer(source), dtypes, size, config, experts)


def config_to_write(folder: Path, model: PreTrainedModel) -> dict[str, Any]:
    """The config of a folder as it is to be written with a checkpoint of this model.

    Where the config ties tensors that the files hold twice with different values, transformers ties none of them; the config
    that is written says so.

    Args:
        folder: holds the config.
        model: what transformers made of it and of the weights.

    Raises:
        ModelError: only some of the tensors that the config ties are tied, which no config can express.
    """
    stored = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    stored.pop("_name_or_path", None)
    state = model.state_dict(keep_vars=True)
    pairs = {n: o for n, o in model.get_expanded_tied_weights_keys(all_submodels=True).items() if n in state and o in state}
    untied = [name for name, other in pairs.items() if state[name] is not state[other]]
    if not untied:
        return stored
    if tied := [name for name in pairs if name not in untied]:
        raise ModelError(
            f"the config in {folder} ties {untied[0]} to {pairs[untied[0]]} and {tied[0]} to {pairs[tied[0]]}; the files hold "
            f"a different {untied[0]}, so the second would have to be tied and the first not. Store {tied[0]} in the files, "
            "too, and set tie_word_embeddings to false in config.json"
        )
    stored["tie_word_embeddings"] = False
    if isinstance(inner := stored.get("text_config"), dict):
        stored["text_config"] = inner | {"tie_word_embeddings": False}
    return stored


def quantization_of(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The `quantization_config` of a config, empty where there is none.

    Raises:
        ModelError: it is not an object.
    """
    about = config.get("quantization_config") or {}
    if not isinstance(about, dict):
        raise ModelError(f"the config of {source} has a quantization_config that is not an object but a {type(about).__name__}")
    return about


def refuse_quantized(config: dict[str, Any], source: str) -> None:
    """Raise ModelError where a config says that the weights are already quantized."""
    if about := quantization_of(config, source):
        method = about.get("quant_method", "unknown")
        raise ModelError(f"{source} is already quantized ({method}); slimlm starts from the original weights")


def refuse_foreign_code(config: dict[str, Any], source: str) -> None:
    """Raise ModelError where opening a model would run code that comes with it or that its config names on the hub.

    A model that comes with code is accepted where transformers has a class for its `model_type`; that class is used.
    """
    named = config.get("auto_map")
    kind = config.get("slimlm_model_type") or config.get("model_type")
    if named and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        found = ", ".join(f"{k}: {v}" for k, v in named.items()) if isinstance(named, dict) else repr(named)
        raise ModelError(
            f"{source} comes with Python code of its own (auto_map: {found}), and transformers knows no model_type {kind!r}. "
            "slimlm runs no code that comes with a model. What works: a model whose model_type this version of transformers "
            "knows (a newer version may know it), or the same weights converted to such a model, whose config has no auto_map"
        )
    for key, value in config.items():
        if key.removeprefix("_") in _IMPLEMENTATIONS and _names_repository(value):
            raise ModelError(
                f"the config of {source} says {key} = {value!r}, which would fetch code from the hub and run it; slimlm does "
                f"not. Remove {key} from config.json: transformers then uses its own"
            )
    for inner in config.values():
        if isinstance(inner, dict):
            refuse_foreign_code({key: inner[key] for key in inner if key.removeprefix("_") in _IMPLEMENTATIONS}, source)


_IMPLEMENTATIONS = (
    "attn_implementation",
    "attn_implementation_internal",
    "experts_implementation",
    "experts_implementation_internal",
)


def _names_repository(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(each, str) and "/" in each for each in values)


def refuse_missing(info: dict[str, Any], source: str, kind: str) -> None:
    """Raise ModelError where transformers did not find all tensors of a model.

    Args:
        info: what `from_pretrained` gives as loading info.
        source: the model's name in messages.
        kind: the name of its class.
    """
    lost = sorted(info["missing_keys"])
    if lost:
        raise ModelError(
            f"{source} lacks {len(lost)} tensors that {kind} needs, {lost[0]} among them; "
            "transformers would fill them with random numbers. Download the model again"
        )


def _stored_dtypes(folder: Path, model: PreTrainedModel) -> dict[str, torch.dtype] | None:
    """The dtype of every tensor in the files, by its name in the model; None where there are no safetensors files.

    The files decide, not the config: a model may keep its norms in float32 with weights in bfloat16.
    """
    stored: dict[str, torch.dtype] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, no mapping
                kind = tensors.get_slice(key).get_dtype()
                if kind in _DTYPES:
                    stored[key] = _DTYPES[kind]
    state = model.state_dict()
    if not stored:
        return None
    if len(set(stored.values())) == 1:
        one = next(iter(stored.values()))
        return {name: one if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    by_memory = {state[name].data_ptr(): dtype for name, dtype in stored.items() if name in state}
    prefix = model.base_model_prefix + "."
    by_memory |= {state[prefix + n].data_ptr(): dtype for n, dtype in stored.items() if prefix + n in state}
    lost = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.data_ptr() not in by_memory]
    if lost:
        raise ModelError(
            f"the files in {folder} mix dtypes and do not name {lost[0]} as {type(model).__name__} does, so it could not be "
            "written back as it was; convert the model to one dtype first"
        )
    return {name: by_memory.get(tensor.data_ptr(), tensor.dtype) for name, tensor in state.items()}


def _guessed_dtypes(source: str) -> dict[str, torch.dtype]:
    """For old .bin files: the dtypes that transformers gives the model."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}
