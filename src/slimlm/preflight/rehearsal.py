"""A rehearsal before the work: what a run does with a model, done once on a few tokens, so that it cannot fail at the end.

The dense model is run on a few random tokens, each block read when it is run. A copy of each block, as the run works on one,
must give what the block in its model gives. The logits that follow from the last block's outputs alone must
be those of the whole model. Config, generation config and tokenizer are written and opened again. Whatever cannot work is
refused by name. See slimlm.calibration.calls for how blocks are called.
"""

import json
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from slimlm.calibration.calls import Calls, copied, hidden_of, observe, same_values
from slimlm.calibration.stages import kind_of
from slimlm.core.errors import ModelError, NumericsError, first_line
from slimlm.evaluation.perplexity import Piece
from slimlm.models.lazy import LazyModel
from slimlm.models.opening import open_generation_config, open_tokenizer
from slimlm.models.placeholders import meta_copy
from slimlm.models.structure import linears_of
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description
from slimlm.verification.stored_model import LastOutputs, StoredModel

_SAME_LOGITS = 1e-2
"""The share of the largest logit by which logits may differ: some classes round activations to the 16 bits in which lm_head is
stored, and sums in another order of addition may be rounded to the neighbouring value."""


def rehearse(dense: LazyModel, blocks: dict[str, nn.Module], compressed: Container[str] = ()) -> Calls:
    """Do once, on a few tokens, what a run does with a model; gives how the model calls its blocks.

    Args:
        dense: The original model.
        blocks: Its blocks by full name, in order.
        compressed: The layers that are to be compressed, by full name.

    Raises:
        ModelError: The model cannot be run block by block, its logits do not follow from its last block's outputs, or it does
            not use some of the layers.
        NumericsError: Its logits hold NaN.
    """
    stored = StoredModel(dense.model, dense.weights, dense.release)
    unused: list[str] = []
    model = stored.around({name: partial(_run_in_place, dense, name, unused) for name in blocks})
    replaced = {name: model.get_submodule(name) for name in blocks}
    with dense.outer_tensors_filled(blocks):
        observed = observe(model, replaced, whole=True, shown=blocks)
    _refuse_unused([layer for layer in unused if layer in compressed], dense)
    assert observed.logits is not None, "the model was run to its end"
    name = type(dense.model).__name__
    if bool(observed.logits.isnan().any()):
        raise NumericsError(
            f"the logits of {dense.source} hold NaN on random tokens, in float32: its weights do not fit {name}, or are damaged"
        )
    pieces = _pieces(observed.tokens)
    outputs = LastOutputs(observed.tokens, observed.hidden, observed.calls.forms)
    for piece, found in zip(pieces, stored.logits(outputs, pieces), strict=True):
        if not same_values(found, observed.logits[piece], _SAME_LOGITS):
            raise ModelError(
                f"the logits of {name} do not follow from its last block's outputs alone; slimlm runs blocks one at a time and "
                "passes on their outputs, so it cannot compress this model"
            )
    return observed.calls


def refuse_shared_weights(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Raise ModelError where two blocks share a weight; only names are compared."""
    owners: dict[int, tuple[str, str]] = {}
    for name, block in blocks.items():
        for key, tensor in block.state_dict(keep_vars=True).items():
            owner, shared = owners.setdefault(id(tensor), (name, f"{name}.{key}"))
            if owner != name:
                raise ModelError(
                    f"blocks of {type(model).__name__} share weights: {name}.{key} is {shared}. slimlm compresses each block "
                    "for inputs of its own, one after another, and cannot compress this model; one of the same family whose "
                    "blocks have weights of their own works"
                )


def rehearse_files(dense: LazyModel, folder: Path) -> None:
    """Write config, generation config and tokenizer to a folder that is there, and open them as a checkpoint's are opened.

    Raises:
        ModelError: Transformers refuses one of them, as it would once all blocks are compressed.
    """
    # First from where it is, so that the message names the user's own file.
    open_generation_config(dense.folder)
    checkpoint.write_config(folder, dense.config, Description({}, {}, ()))
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if dense.tokenizer is not None:
            dense.tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # Code of transformers and tokenizers, which raises whatever it meets in files that make no sense.
        raise ModelError(
            f"the config or the tokenizer of {dense.source} cannot be written and opened again: {first_line(error)}"
        ) from error
    open_tokenizer(str(folder))


def _run_in_place(dense: LazyModel, name: str, unused: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a block of the meta model, which holds its values meanwhile.

    Args:
        dense: The model.
        name: The block's name.
        unused: Gets the full names of its layers that are given no input, experts apart.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        ModelError: A copy of the block does not give the same.
    """
    block = dense.model.get_submodule(name)
    given = copied((args, kwargs), torch.clone)
    dense.fill(block, name)
    try:
        with _noting_use(block) as used:
            output = block(*args, **kwargs)
        copy = meta_copy(block)
        for own, original in zip(_tensors(copy), _tensors(block), strict=True):
            own.data = original.data
        found = copy(*given[0], **given[1])
    finally:
        dense.empty(block)
    unused += [f"{name}.{layer}" for layer in linears_of(block) if layer not in used and kind_of(block, layer) == layer]
    if not same_values(hidden_of(found), hidden_of(output)):
        raise ModelError(
            f"a copy of {name}, a {type(block).__name__}, gives other outputs than the block in its model: it reads something "
            "outside of itself. slimlm compresses blocks one at a time, away from their model, and cannot compress this one"
        )
    return output


@contextmanager
def _noting_use(block: nn.Module) -> Iterator[set[str]]:
    """The names of the block's linear layers that are given an input within this context."""
    used: set[str] = set()
    handles = [
        linear.register_forward_pre_hook(lambda _, __, name=name: used.add(name)) for name, linear in linears_of(block).items()
    ]
    try:
        yield used
    finally:
        for handle in handles:
            handle.remove()


def _refuse_unused(layers: list[str], dense: LazyModel) -> None:
    """Raise ModelError where layers that are to be compressed are given no input."""
    if not layers:
        return
    more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    inside = {".".join(layer.split(".")[-2:]) for layer in layers}
    raise ModelError(
        f"{layers[0]}{more} of {type(dense.model).__name__} got no input: the model uses the weights in another way, or does not "
        f"use them on plain text. Exclude them from the recipe (ignore = {json.dumps([f'*.{name}' for name in sorted(inside)])})"
    )


def _tensors(block: nn.Module) -> list[Tensor]:
    return list(block.state_dict(keep_vars=True).values())


def _pieces(tokens: Tensor) -> list[Piece]:
    """Samples and positions of pieces of tokens `[samples, length]`: one sample, and half of the positions, at a time."""
    count, length = tokens.shape
    halves = (slice(0, length // 2), slice(length // 2, length))
    return [(slice(row, row + 1), positions) for row in range(count) for positions in halves]
