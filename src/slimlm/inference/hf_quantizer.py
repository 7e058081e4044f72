"""The checkpoint format in transformers: `AutoModelForCausalLM.from_pretrained(folder)` opens a compressed model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimlm.models.experts import take_apart
from slimlm.models.structure import swap
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint


class _CheckpointConfig(PreTrainedConfig):
    """Opens config.json, where a checkpoint's model type stands in place of the model's own, as the model's own config."""

    model_type = checkpoint.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = {**config_dict, "model_type": config_dict.get("slimlm_model_type")}
        own.pop("slimlm_model_type", None)
        return CONFIG_MAPPING[own["model_type"]].from_dict(own, **kwargs)


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


class SlimlmQuantizer(HfQuantizer):
    """Puts empty compressed modules into the meta model, for transformers to load the packed tensors into.

    Transformers ties parameters only, so a head that is tied to a packed embedding is removed from what it would tie.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for file in (kwargs.get("checkpoint_files") or [])[:1]:
            if (Path(file).parent / checkpoint.RECORD).is_file():
                checkpoint.check_files(Path(file).parent)
        for name in self.quantization_config.experts:
            take_apart(model, name)
        for name, about in self.quantization_config.embeddings.items():
            swap(model, name, CompressedEmbedding.empty(about, model.get_submodule(name).weight.dtype))
        for name, about in self.quantization_config.layers.items():
            layer = CompressedLinear.empty(about)
            if "tied_to" in about:
                layer = TiedLinear(model.get_submodule(about["tied_to"]), layer.bias)
            layer.kernels = "auto"
            swap(model, name, layer)
        if self.quantization_config.embeddings:
            _exclude_from_tying(model, {*self.quantization_config.layers, *self.quantization_config.embeddings})
        return model

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: the packed tensors are frozen."""
        return False


def _exclude_from_tying(model: PreTrainedModel, packed: set[str]) -> None:
    """Keep transformers from tying parameters of these modules, now and by `tie_weights` later."""

    def others(pairs: Any) -> Any:
        return {a: b for a, b in pairs.items() if not {a.rpartition(".")[0], b.rpartition(".")[0]} & packed}

    model.all_tied_weights_keys = others(model.all_tied_weights_keys)
    model._tied_weights_keys = model.all_tied_weights_keys


def register_with_transformers() -> None:
    """Make the format known to transformers; to be called once in a process."""
    register_quantization_config(checkpoint.METHOD)(SlimlmConfig)
    register_quantizer(checkpoint.METHOD)(SlimlmQuantizer)
    AutoConfig.register(checkpoint.MODEL_TYPE, _CheckpointConfig)
