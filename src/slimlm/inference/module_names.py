"""The modules of a causal language model in other classes of transformers that hold the same weights.

A checkpoint names its layers as the causal model does. A bare model (AutoModel) has them without the first part of the name,
and no head; a classifier (AutoModelForSequenceClassification) has a head of its own, and some have another first part.
"""

from collections.abc import Iterable

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from slimlm.core.errors import CheckpointError


def other_base(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The name of the base model inside the causal model and inside this one; empty where they are the same, or this is it."""
    theirs, own = _causal_class(model).base_model_prefix, model.base_model_prefix
    return [] if theirs == own or model.base_model is model else [(theirs, own)]


def _causal_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The causal language model of this model's config; the model's own class where transformers has none."""
    found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), type(model))
    return found


def names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names in this model of modules of the causal model, by their names there, without those outside its base model.

    Raises:
        CheckpointError: a module inside the base model is missing.
    """
    modules = {name for name, _ in model.named_modules()}
    causal = _causal_class(model)
    first = f"{causal.base_model_prefix}."
    found = {}
    for name in names:
        inner = name.removeprefix(first)
        options = [name] if inner == name else [name, inner, f"{model.base_model_prefix}.{inner}"]
        own = next((option for option in options if option in modules), None)
        if own is not None:
            found[name] = own
        elif inner != name or isinstance(model, causal):
            raise CheckpointError(f"the checkpoint describes {name}, and {type(model).__name__} has no such module")
    return found
