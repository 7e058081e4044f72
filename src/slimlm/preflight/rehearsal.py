"""A rehearsal before the work: what a run does with a model, done once on a few tokens, so that it cannot fail at the end.

The dense model is run on a few random tokens, each block read when it is run. A copy of each block, as the run works on one,
must give what the block in its model gives. The logits that follow from the last block's outputs alone must
be those of the whole model. Config, generation config and tokenizer are written and opened again. Whatever cannot work is
refused by name. See slimlm.calibration.calls for how blocks are called.
"""

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from slimlm.calibration.calls import Calls, Observed, copied, hidden_of, observe, same_values
from slimlm.calibration.stages import kind_of
from slimlm.core.errors import CheckpointError, ModelError, NumericsError, first_line, is_out_of_memory
from slimlm.evaluation.perplexity import Piece
from slimlm.evaluation.stored_model import LastOutputs, StoredModel
from slimlm.models.lazy import LazyModel
from slimlm.models.opening import open_generation_config, open_tokenizer
from slimlm.models.placeholders import meta_copy, placeholder
from slimlm.models.structure import linears_of, swap, weight_of
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description

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
        NumericsError: Activations or its logits hold NaN.
    """
    trial = _Trial(dense, compressed, list(dense.outer_tensors(blocks).values()), {})
    observed = _observed(trial, blocks)
    _refuse_unfit(trial.unfit, dense)
    assert observed.logits is not None, "the model was run to its end"
    name = type(dense.model).__name__
    if bool(observed.logits.isnan().any()):
        raise NumericsError(
            f"the logits of {dense.source} hold NaN on random tokens, in float32: its weights do not fit {name}, or are damaged"
        )
    pieces = _pieces(observed.tokens)
    stored = StoredModel(dense.model, dense.weights, dense.release)
    outputs = LastOutputs(observed.tokens, observed.hidden, observed.calls.forms)
    for piece, found in zip(pieces, stored.logits(outputs, pieces), strict=True):
        if not same_values(found, observed.logits[piece], _SAME_LOGITS):
            raise ModelError(
                f"the logits of {name} do not follow from its last block's outputs alone; slimlm runs blocks one at a time and "
                "passes on their outputs, so it cannot compress this model"
            )
    dense.release(dense.weights[name] for name in dense.outside(blocks))
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
        CheckpointError: The folder cannot be written to.
    """
    # First from where it is, so that the message names the user's own file.
    open_generation_config(dense.folder)
    checkpoint.write_config(folder, dense.config, Description({}, {}, ()))
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if dense.tokenizer is not None:
            dense.tokenizer.save_pretrained(folder)
        open_tokenizer(str(folder))
    except Exception as error:
        # Code of transformers and tokenizers, which raises whatever it meets in files that make no sense.
        if is_out_of_memory(error):
            raise
        what = f"the config or the tokenizer of {dense.source} cannot be written and opened again"
        if isinstance(error, OSError) and error.errno is not None:
            raise CheckpointError(f"{what} in the folder of temporary files: {error.strerror}") from error
        # The folder is a temporary one, of which the user knows nothing.
        raise ModelError(f"{what}: {first_line(error).replace(str(folder), dense.source)}") from error


@dataclass(frozen=True)
class _Trial:
    """Runs the blocks of a meta model, each filled while it runs, and copies of them as they will be compressed."""

    dense: LazyModel
    """The model."""
    compressed: Container[str]
    """The layers that are to be compressed, by full name."""
    outside: list[Tensor]
    """The tensors outside the blocks, which a copy of a block does not have."""
    unfit: dict[str, list[str]]
    """Gets the layers whose weight is not used by calls of the layer alone: their full names, by kind."""

    def run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a block; raises ModelError where a copy of it does not give the same."""
        block = self.dense.model.get_submodule(name)
        given = copied((args, kwargs), torch.clone)
        self.dense.fill(block, name)
        try:
            output = block(*args, **kwargs)
            self._compare(name, block, given, hidden_of(output))
        finally:
            self.dense.empty(block)
        return output

    def _compare(self, name: str, block: nn.Module, given: tuple[Any, Any], expected: Tensor) -> None:
        """Run copies of a block, whose output's hidden states are expected to be these, `[samples, length, width]`."""
        kinds: dict[str, list[str]] = {}
        for layer in linears_of(block):
            if f"{name}.{layer}" in self.compressed:
                kinds.setdefault(kind_of(block, layer), []).append(layer)
        # A kind that an earlier block has shown to be unfit is not tried again.
        tried = [kind for kind in kinds if kind not in self.unfit]
        layers = [layer for kind in tried for layer in kinds[kind]]
        alike, called = self._copy_gives(block, layers, given, expected)
        if not alike and not self._copy_gives(block, [], given, expected)[0]:
            raise ModelError(
                f"a copy of {name}, a {type(block).__name__}, gives other outputs than the block in its model: it reads "
                "something outside of itself. slimlm compresses blocks one at a time, away from their model, and cannot "
                "compress this one"
            )
        unfit = []
        for kind in tried:
            # Where all of them together do not work, one kind after another shows which.
            works, used = (alike, called) if alike else self._copy_gives(block, kinds[kind], given, expected)
            # An expert may be given none of a few tokens.
            if not works or (kinds[kind] == [kind] and kind not in used):
                unfit.append(kind)
        if not alike and not unfit:
            # Each works where the others are as they were.
            unfit = tried
        for kind in unfit:
            self.unfit[kind] = []
        for kind in kinds.keys() & self.unfit.keys():
            self.unfit[kind] += [f"{name}.{layer}" for layer in kinds[kind]]

    def _copy_gives(
        self, block: nn.Module, layers: list[str], given: tuple[Any, Any], expected: Tensor
    ) -> tuple[bool, set[str]]:
        """Run a copy of a block in which these layers can only be called; gives whether its output is the same, and which were.

        Args:
            block: The block, with its values, which the copy shares.
            layers: The names of layers within it.
            given: Its positional and keyword arguments.
            expected: The hidden states of its output, `[samples, length, width]`.
        """
        copy = meta_copy(block, self.outside)
        for own, original in zip(_tensors(copy), _tensors(block), strict=True):
            own.data = original.data
        called: set[str] = set()
        for layer in layers:
            swap(copy, layer, _OnlyCalled(copy.get_submodule(layer), partial(called.add, layer)))
        args, kwargs = copied(given, torch.clone)
        try:
            return same_values(hidden_of(copy(*args, **kwargs)), expected), called
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            if is_out_of_memory(error):
                raise
            # The block uses what a compressed layer does not have; the caller names the layer.
            return False, called


class _OnlyCalled(nn.Module):
    """A linear layer as it looks when it is compressed: it can be called, but its `weight` holds integers."""

    def __init__(self, linear: nn.Module, note: Callable[[], None]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_of(linear).shape
        self.bias = dict(linear.named_parameters()).get("bias")
        self.register_buffer("weight", placeholder((self.out_features, self.in_features), torch.uint8))
        # In a tuple, so that the layer does not become a part of this module.
        self._linear, self._note = (linear,), note

    def forward(self, x: Tensor) -> Tensor:
        self._note()
        output = self._linear[0](x)
        assert isinstance(output, Tensor)
        return output


def _observed(trial: _Trial, blocks: dict[str, nn.Module]) -> Observed:
    """The result of running the model to its end, each block tried when it is run."""
    dense = trial.dense
    with dense.outer_tensors_filled(blocks):
        # Shared, so that those which are not used in the 16 bits that they are stored in are in memory once.
        filled = {name: tensor.data for name, tensor in dense.outer_tensors(blocks).items()}
        stored = StoredModel(dense.model, {**dense.weights, **filled}, dense.release)
        model = stored.around({name: partial(trial.run, name) for name in blocks})
        return observe(model, {name: model.get_submodule(name) for name in blocks}, whole=True, shown=blocks)


def _refuse_unfit(unfit: Mapping[str, list[str]], dense: LazyModel) -> None:
    """Raise ModelError where layers that are to be compressed, by kind, are not used by calls alone."""
    # A block may have been run more than once.
    layers = list(dict.fromkeys(layer for own in unfit.values() for layer in own))
    if not layers:
        return
    more = f" (one of {len(layers)} layers)" if len(layers) > 1 else ""
    patterns = json.dumps(sorted(f"*.{kind}" for kind in unfit))
    raise ModelError(
        f"{type(dense.model).__name__} reads the weight of {layers[0]}{more} in another way than by calling the layer, or does "
        f"not use it on plain text, so it cannot be compressed. Exclude such layers from the recipe (ignore = {patterns})"
    )


def _tensors(block: nn.Module) -> list[Tensor]:
    return list(block.state_dict(keep_vars=True).values())


def _pieces(tokens: Tensor) -> list[Piece]:
    """Samples and positions of pieces of tokens `[samples, length]`: one sample, and half of the positions, at a time."""
    count, length = tokens.shape
    halves = (slice(0, length // 2), slice(length // 2, length))
    return [(slice(row, row + 1), positions) for row in range(count) for positions in halves]
