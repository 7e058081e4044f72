"""The quantizer of a checkpoint, registered with transformers: imported once transformers' own table of quantizers exists.

That table is made while transformers' models are still being imported, so what needs them is imported when a model is opened.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from slimlm.storage import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimlm.inference.compressed_model import Origin


@register_quantization_config(checkpoint.METHOD)
class SlimlmConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint."""

    def __init__(
        self,
        format: int = checkpoint.FORMAT,
        layers: dict[str, Any] | None = None,
        embeddings: dict[str, Any] | None = None,
        experts: list[str] | None = None,
        others: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = checkpoint.METHOD
        self.format = format
        self.layers = layers or {}
        self.embeddings = embeddings or {}
        self.experts = experts or []
        self.others = others or []
        checkpoint.check_format(format, "the checkpoint")


@register_quantizer(checkpoint.METHOD)
class SlimlmQuantizer(HfQuantizer):
    """Puts empty compressed modules into the meta model, for transformers to load the packed tensors into.

    Transformers can tie only parameters; a head that is tied to a packed embedding is excluded from its tying. The model may be
    of any class that holds the causal model's layers; afterwards it is a `CompressedModel`, too.
    """

    requires_calibration = True
    origin: "Origin | None" = None
    """The checkpoint, where the model is loaded from its folder."""

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry
        from slimlm.inference.compressed_model import Origin
        from slimlm.inference.module_names import names_in
        from slimlm.models.experts import take_apart
        from slimlm.models.structure import swap
        from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
        from slimlm.runtime.linear import CompressedLinear

        for file in (kwargs.get("checkpoint_files") or [])[:1]:
            if (Path(file).parent / checkpoint.RECORD).is_file():
                self.origin = Origin.of(Path(file).parent)
        about = self.quantization_config
        for name in names_in(model, about.experts).values():
            take_apart(model, name)
        names = names_in(model, (*about.embeddings, *about.layers))
        for name in names.keys() & about.embeddings.keys():
            embedding = EmbeddingEntry.parse(about.embeddings[name])
            swap(model, names[name], CompressedEmbedding.empty(embedding, model.get_submodule(names[name]).weight.dtype))
        for name in names.keys() & about.layers.keys():
            entry = LayerEntry.parse(about.layers[name])
            layer = CompressedLinear.empty(entry)
            if entry.tied_to is not None:
                layer = TiedLinear(model.get_submodule(names[entry.tied_to]), layer.bias)
            layer.kernels = "auto"
            swap(model, names[name], layer)
        _pass_over(model, about.others)
        if about.embeddings:
            _exclude_from_tying(model, set(names.values()))
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        from slimlm.inference.compressed_model import become_compressed

        become_compressed(model, self.origin)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Only the base model's name changes: tensors are stored as the causal model's state names them, experts one by one."""
        from transformers.core_model_loading import WeightRenaming

        from slimlm.inference.module_names import other_base

        del weight_conversions
        return [WeightRenaming(rf"^{theirs}\.", f"{own}.") for theirs, own in other_base(model)]

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The packed tensors are frozen."""
        return False


def _pass_over(model: "PreTrainedModel", others: list[str]) -> None:
    """Let transformers not warn of these tensors of the files, which the model has no place for."""
    if others:
        model._keys_to_ignore_on_load_unexpected |= {f"^{re.escape(name)}$" for name in others}


def _exclude_from_tying(model: "PreTrainedModel", packed: set[str]) -> None:
    """Let transformers tie no parameter of these modules in this model: not now, and not by `tie_weights` later."""

    def others(pairs: Any) -> Any:
        return {a: b for a, b in pairs.items() if not {a.rpartition(".")[0], b.rpartition(".")[0]} & packed}

    model.all_tied_weights_keys = others(model.all_tied_weights_keys)
    model._tied_weights_keys = model.all_tied_weights_keys
