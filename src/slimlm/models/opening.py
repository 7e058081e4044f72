"""A dense model, its config and its tokenizer, opened from a folder or the hub; code that comes with a model is never run."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import RLock
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from slimlm.core.errors import ModelError, first_line, is_out_of_memory
from slimlm.hub import can_be_model, unreachable
from slimlm.models.beside import BELONGING
from slimlm.models.gguf_config import config_of
from slimlm.models.gguf_header import is_gguf, open_gguf

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def read_config(source: str) -> dict[str, Any]:
    """A model's config, unchanged from its file.

    Args:
        source: a folder, or a name on the hub; of a GGUF file, or a folder of its own, the config that its header describes.

    Raises:
        ModelError: there is no config, or it is damaged.
    """
    folder = Path(source)
    if is_gguf(source):
        return config_of(open_gguf(source))
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{source} is a folder without config.json{_without_config(folder)}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not JSON ({error}); the download may be damaged") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} holds no JSON object; the download may be damaged")
        return config
    if folder.is_file():
        raise ModelError(f"{source} is a file; give the folder that holds a model's config.json and weights, or a .gguf file")
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


def _without_config(folder: Path) -> str:
    """What a folder without config.json holds instead, and what would work."""
    if (folder / ADAPTER_CONFIG).is_file():
        return f": it holds an adapter{_base_of(folder)} and no model. {_MERGE}"
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"; there is one in its folder {inner[0]}: give {folder / inner[0]}"
    return "; give a model folder or a hub name"


ADAPTER_CONFIG = "adapter_config.json"
"""The file by which transformers and peft find an adapter."""
_MERGE = (
    "Merge it into its base model first: with peft, PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(folder); then compress that folder"
)


def _base_of(folder: Path) -> str:
    """Which base model an adapter's config names."""
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        # The adapter is not read; its config only makes the message better.
        return ""
    return f" for {base}" if isinstance(base, str) and base else ""


def refuse_adapter(folder: Path, source: str) -> None:
    """Raise ModelError where a folder holds an adapter, which transformers would apply and slimlm does not read."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    files = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    weights = [name for name in files if not name.startswith("adapter")]
    held = f"{source} holds an adapter{_base_of(folder)} ({ADAPTER_CONFIG})"
    if not weights:
        raise ModelError(f"{held} and no weights of a model. {_MERGE}")
    raise ModelError(
        f"{held} and the full model as well: with peft installed, transformers applies it, so the folder would stand for two "
        f"different models. {_MERGE}; or remove {ADAPTER_CONFIG} and the adapter's weights to compress the model without it"
    )


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
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", *BELONGING]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", "pytorch_model*.bin", *BELONGING]))
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
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Invalid files, the model's config among them, can make transformers raise any exception.
        folder = folder_of(source)
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        raise ModelError(f"the tokenizer of {source} cannot be opened: {_why_unopened(folder, error)}") from error


def _why_unopened(folder: Path, error: Exception) -> str:
    """Why transformers cannot open a tokenizer, and what would work."""
    if code := _code_of_tokenizer(folder):
        return (
            f"it comes with Python code of its own ({code}), and slimlm runs no code that comes with a model. What works: a "
            "tokenizer.json in the folder, which is read without that code, and a tokenizer_config.json without auto_map"
        )
    own = next((name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file()), None)
    if own is not None and not (folder / "tokenizer.json").is_file():
        lacking = [name for name in _SENTENCEPIECE if not _installed(name)]
        if lacking:
            return (
                f"{own} is a SentencePiece model, which transformers reads with the packages {' and '.join(_SENTENCEPIECE)}. "
                f"Install them (pip install {' '.join(lacking)}), or add a tokenizer.json to the folder"
            )
        return (
            f"transformers cannot read {own}, although its packages are installed; download it again, or add a tokenizer.json"
        )
    return first_line(error)


_SENTENCEPIECE = ("sentencepiece", "protobuf")
"""Packages that SentencePiece models are read with."""


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _code_of_tokenizer(folder: Path) -> str | None:
    """The class of its own that a tokenizer's config names; None where it names none."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = config["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return ", ".join(str(name) for name in named if name) if isinstance(named, list) else str(named)


def open_generation_config(folder: Path) -> GenerationConfig:
    """The generation config as transformers finds it: in its own file, or else in the model's config.

    Raises:
        ModelError: transformers refuses it.
    """
    own = (folder / "generation_config.json").is_file()
    name, reading = ("generation_config.json", {}) if own else ("config.json", {"_from_model_config": True})
    try:
        return GenerationConfig.from_pretrained(folder, config_file_name=name, **reading)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{name} in {folder} cannot be opened as a generation config ({first_line(error)}); correct the file: transformers "
            "would refuse it when the model generates text"
        ) from error


@contextmanager
def loading_settings() -> Iterator[None]:
    """Within this context transformers shows no progress bars, and loads tensors in the thread that calls it.

    slimlm reports its progress itself. Threads gain nothing where tensors are views of files, and one that cannot be started
    because memory runs out would be waited for without end. Both settings are the process's, so threads wait for one another.
    """
    with _LOADING:
        shown, before = transformers_logging.is_progress_bar_enabled(), os.environ.get(_ONE_THREAD)
        transformers_logging.disable_progress_bar()
        os.environ[_ONE_THREAD] = "1"
        try:
            yield
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
            if before is None:
                os.environ.pop(_ONE_THREAD, None)
            else:
                os.environ[_ONE_THREAD] = before


_LOADING = RLock()
_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
"""The environment variable by which transformers loads tensors in the thread that calls it."""


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
    for each in (stored, *(inner for inner in stored.values() if isinstance(inner, dict))):
        for key in [key for key, value in each.items() if "attn_implementation" in key and value not in OWN_ATTENTION]:
            del each[key]
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


def refuse_quantized(config: dict[str, Any], source: str, folder: Path | None = None) -> None:
    """Raise ModelError where a config, or another file of the folder, says that the weights are already quantized."""
    if about := quantization_of(config, source):
        raise ModelError(_quantized(source, about.get("quant_method", "unknown")))
    if compression := config.get("compression_config"):
        raise ModelError(_quantized(source, f"compression_config: {_method_of(compression)}"))
    for key, inner in config.items():
        if isinstance(inner, dict) and any(inner.get(name) for name in ("quantization_config", "compression_config")):
            own = inner.get("quantization_config") or inner["compression_config"]
            raise ModelError(_quantized(source, f"{_method_of(own)}, by the quantization_config in {key}"))
    for name in _QUANTIZATION_FILES:
        if folder is not None and (folder / name).is_file():
            raise ModelError(_quantized(source, f"it has a {name}"))


_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which GPTQ, AWQ and ModelOpt say how they quantized a model."""


def _quantized(source: str, how: str) -> str:
    return (
        f"{source} is already quantized ({how}); slimlm starts from the original weights, or from codes of fp8, mxfp4, "
        "compressed-tensors, gptq or awq that the quantization_config of config.json describes. Of another format, dequantize "
        "them first: with transformers, model.dequantize() and save_pretrained, where it can"
    )


def _method_of(about: object) -> str:
    found = about.get("quant_method") or about.get("format") if isinstance(about, dict) else None
    return str(found or "unknown")


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


OWN_ATTENTION = ("eager", "sdpa")
"""The implementations of attention that need no package besides torch. Another one that a config names is not used: which one
computes is a matter of the machine, not of the model."""


def _names_repository(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(each, str) and "/" in each for each in values)
