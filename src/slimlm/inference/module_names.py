"""The modules of a causal language model in other classes of transformers that hold the same weights.

A checkpoint names its layers as the causal model does. A bare model (AutoModel) has them without the first part of the name, and
no head; a classifier (AutoModelForSequenceClassification) has them under a name of its own, and a head of its own.
"""

from collections.abc import Iterable

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from slimlm.core.errors import CheckpointError


def names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names in this model of modules of the causal model, by their names there, without those outside its base model.

    Raises:
        CheckpointError: a module inside the base model is missing.
    """
    modules = {name for name, _ in model.named_modules()}
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), type(model))
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
