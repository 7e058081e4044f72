"""The switches of a model's config that change what its forward pass returns or computes in addition to the logits.

A config may ask for tuples in place of objects with fields, for the hidden states or attention weights of every block, or for
the loss of routers. slimlm reads logits and hidden states, and runs models whose blocks are replaced or skipped, which have no
such additional outputs. The models that it opens for itself therefore have these switches off. The config that is written with
a checkpoint is the source's.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig

_ADDITIONAL = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Switches that add outputs, or a loss, to those of a model."""


def name_outputs(model: nn.Module) -> None:
    """Make the model return its outputs by name: classes of transformers fail on the tuples of return_dict = false."""
    for config in _configs(model):
        config.return_dict = True


def plain_outputs(model: nn.Module) -> None:
    """Make the model compute its logits, return them by name, and give nothing else, whatever its config asks for."""
    name_outputs(model)
    for config in _configs(model):
        for switch in _ADDITIONAL:
            if getattr(config, switch, False):
                setattr(config, switch, False)


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    """The configs that the model's modules read, those of its parts (text, images) included; each once."""
    owned = [config for module in model.modules() if isinstance(config := getattr(module, "config", None), PreTrainedConfig)]
    found = {id(config): config for config in owned}
    waiting = list(found.values())
    while waiting:
        outer = waiting.pop()
        for name in outer.sub_configs:
            inner = getattr(outer, name, None)
            if isinstance(inner, PreTrainedConfig) and id(inner) not in found:
                found[id(inner)] = inner
                waiting.append(inner)
    yield from found.values()
