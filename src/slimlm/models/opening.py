"""Open a dense model from a folder or the hub, and say in words what is wrong when that fails."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from slimlm.core.errors import ModelError
from slimlm.models.structure import original_dtypes


@dataclass(frozen=True)
class DenseModel:
    """A model in float32 on the CPU, with what is needed to write it back as it was."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    dtypes: dict[str, torch.dtype]
    """of every tensor as stored, by name; casting back gives the stored values bit for bit"""
    bytes: int
    """size of its tensors as stored; tied tensors count once"""
    config: dict[str, Any]


def read_config(source: str) -> dict[str, Any]:
    """A model's config as a dictionary; raises ModelError where there is none."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{source} is a folder without config.json; give a model folder or a hub name")
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ModelError(f"{path} is not JSON ({error}); the download may be damaged") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} holds no JSON object; the download may be damaged")
        return config
    if folder.exists() or source.startswith((".", "/", "~")):
        raise ModelError(f"no model folder at {source}")
    try:
        config = AutoConfig.from_pretrained(source).to_dict()
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(
            f"{source!r} is neither a folder here nor a model that the hub gave ({_first_line(error)}). "
            "Give the path of a downloaded model folder, or check the name and the network"
        ) from error
    return dict(config)


def open_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen meanwhile; ours tell what a run does."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def open_dense(source: str) -> DenseModel:
    """Load a causal language model in float32; nothing is trusted to run code.

    Raises ModelError for a missing, damaged, incomplete or already quantized model.
    """
    config = read_config(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"{source} is already quantized ({method}); slimlm starts from the original weights")
    try:
        with without_bars():
            model, info = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    except SafetensorError as error:
        raise ModelError(f"a weight file of {source} is damaged or cut short ({error}); download it again") from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source} cannot be opened as a causal language model: {_first_line(error)}") from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise ModelError(
            f"{source} lacks {len(lost)} tensors that {type(model).__name__} needs, {lost[0]} among them; "
            "transformers would fill them with random numbers. Download the model again"
        )
    dtypes = original_dtypes(model)
    model = model.float().eval().requires_grad_(False)
    size = sum({t.data_ptr(): t.numel() * dtypes[name].itemsize for name, t in model.state_dict().items()}.values())
    return DenseModel(source, model, open_tokenizer(source), dtypes, size, _as_stored(source, config))


def _as_stored(source: str, config: dict[str, Any]) -> dict[str, Any]:
    path = Path(source) / "config.json"
    stored = json.loads(path.read_text()) if path.is_file() else dict(config)
    stored.pop("_name_or_path", None)
    return stored


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
