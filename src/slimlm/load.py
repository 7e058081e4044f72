"""Open a checkpoint as a transformers model with `CompressedLinear` inside.

Importing this module registers the format with transformers, so that `AutoModelForCausalLM.from_pretrained(folder)` works
after `import slimlm`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimlm.core.errors import CheckpointError
from slimlm.models.opening import read_config, without_bars
from slimlm.models.structure import swap
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint


def load(source: str | Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A compressed model from its folder (or a hub name), in the dtype of its original or the one given.

    Raises CheckpointError for a damaged, incomplete or newer checkpoint, before or instead of handing out a model.
    """
    source = str(source)
    method = (read_config(source).get("quantization_config") or {}).get("quant_method")
    if method != checkpoint.METHOD:
        raise CheckpointError(
            f"{source} is not a slimlm checkpoint (quant_method: {method or 'none'}); compress it first with "
            "'slimlm compress', or open a dense model with transformers"
        )
    if Path(source).is_dir():
        checkpoint.verify_files(Path(source))
    try:
        with without_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{source} cannot be opened: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise CheckpointError(f"{source} does not fit its own description: {kind} {sorted(map(str, info[kind]))[:3]}")
    return model.eval().requires_grad_(False)


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

    def __init__(self, format: int = checkpoint.FORMAT, layers: dict[str, Any] | None = None, **_: Any) -> None:
        self.quant_method = checkpoint.METHOD
        self.format = format
        self.layers = layers or {}
        checkpoint.check_format(format, "the checkpoint")


@register_quantizer(checkpoint.METHOD)
class SlimlmQuantizer(HfQuantizer):
    """Puts empty compressed layers into the skeleton of the model, for transformers to load the packed tensors into."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for file in (kwargs.get("checkpoint_files") or [])[:1]:
            if (Path(file).parent / checkpoint.RECORD).is_file():
                checkpoint.verify_files(Path(file).parent)
        for name, about in self.quantization_config.layers.items():
            swap(model, name, CompressedLinear.empty(about))
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The packed tensors are frozen."""
        return False


AutoConfig.register(checkpoint.MODEL_TYPE, _CheckpointConfig)
