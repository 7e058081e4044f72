"""The config of a checkpoint, registered with transformers: imported once transformers' own table of configs exists."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from slimlm.storage import checkpoint


class CheckpointConfig(PreTrainedConfig):
    """The config of a checkpoint's model type; reading it returns a config of the model's original type."""

    model_type = checkpoint.MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = {**config_dict, "model_type": config_dict.get("slimlm_model_type")}
        own.pop("slimlm_model_type", None)
        return CONFIG_MAPPING[own["model_type"]].from_dict(own, **kwargs)


class FormerCheckpointConfig(CheckpointConfig):
    """The config of checkpoints with the former sentence."""

    model_type = checkpoint.FORMER_MODEL_TYPE


AutoConfig.register(checkpoint.MODEL_TYPE, CheckpointConfig)
AutoConfig.register(checkpoint.FORMER_MODEL_TYPE, FormerCheckpointConfig)
