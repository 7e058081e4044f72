"""A model that runs from its stored tensors, a dense model's or a checkpoint's, with one block at a time in memory.

Modules outside the blocks stay in the 16 bits that they are stored in (slimlm.runtime.dense), so that they take no memory in
addition to the mapped files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.calibration.calls import OutputForm, hidden_of
from slimlm.calibration.capture import sent_to
from slimlm.core.errors import CheckpointError
from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry, StoredEntry
from slimlm.models.experts import take_apart
from slimlm.models.meta import meta_model
from slimlm.models.opening import loading_settings
from slimlm.models.outputs import plain_outputs
from slimlm.models.placeholders import meta_copy, placeholder
from slimlm.models.structure import blocks_of, swap
from slimlm.runtime.dense import widen_activations
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage.entries import Description
from slimlm.storage.mapping import MappedFiles

_CPU = torch.device("cpu")
Forward = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""A function from a block's arguments to its output."""


@dataclass(frozen=True)
class LastOutputs:
    """The last block's outputs for some tokens."""

    tokens: Tensor
    """The tokens, `[samples, length]`."""
    hidden: Tensor
    """The hidden states, `[samples, length, width]`."""
    forms: Mapping[str, OutputForm]
    """The form of each block's output, by name."""


@dataclass(frozen=True)
class LossGradient:
    """A loss, and its gradient at the last block's outputs."""

    loss: float
    """The loss."""
    gradient: Tensor
    """Float32 `[samples, length, width]`."""


@dataclass(frozen=True)
class StoredModel:
    """A meta model, and the tensors that belong into it."""

    meta_model: PreTrainedModel
    """The model; its parameters have shapes and no values (see slimlm.models.lazy)."""
    tensors: dict[str, Tensor]
    """The stored tensors, by full name; of tied tensors one is enough."""
    release: Callable[[Iterable[Tensor]], Any]
    """A function that drops the memory pages of those of its tensors that are views of a file."""
    layers: Mapping[str, LayerEntry] = field(default_factory=dict)
    """The entries of compressed layers, by full name."""
    embeddings: Mapping[str, EmbeddingEntry] = field(default_factory=dict)
    """The entries of compressed embeddings, by full name."""

    def block(self, name: str, device: torch.device) -> nn.Module:
        """A block in float32, on the device."""
        block = meta_copy(self.meta_model.get_submodule(name))
        self._put_compressed(block, name)
        self._put_others(block, name)
        for module in block.modules():
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_floating_point() and key not in getattr(module, "packed_names", ()):
                    tensor.data = tensor.data.float()
        return block.to(device)

    def _run(self, name: str, device: torch.device, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self.block(name, device)(*sent_to(args, device), **sent_to(kwargs, device))
        self.release(tensor for full, tensor in self.tensors.items() if full.startswith(f"{name}."))
        return sent_to(output, _CPU)

    def assembled(self, device: torch.device = _CPU) -> PreTrainedModel:
        """A model that makes each block, on the device, when it is run, and computes in float32."""
        return self.around(self._blocks_made(device))

    def _blocks_made(self, device: torch.device) -> dict[str, Forward]:
        return {name: partial(self._run, name, device) for name in blocks_of(self.meta_model)}

    def outputs(self, ids: Tensor, device: torch.device, *, outside: "StoredModel | None" = None) -> LastOutputs:
        """The last block's outputs; logits are not computed.

        Args:
            ids: Token ids `[samples, length]`.
            device: The device that blocks are run on.
            outside: The model whose modules outside the blocks are used; None: this one.
        """
        model = (outside or self).around(self._blocks_made(device))
        return last_outputs(model, tuple(blocks_of(self.meta_model)), ids)

    def logits(
        self, outputs: LastOutputs, pieces: Iterable[tuple[slice, slice]], *, device: torch.device = _CPU
    ) -> Iterator[Tensor]:
        """The logits from the last block's outputs; the modules after the blocks compute in float32.

        Args:
            outputs: The last block's outputs.
            pieces: Samples and positions of each piece.
            device: The device that the modules after the blocks are run on.

        Yields:
            The logits `[samples, positions, vocabulary]` of each piece.
        """
        head = self.head(outputs.forms, device)
        for piece in pieces:
            # Yielded outside of no_grad, which would otherwise apply to the caller's code, too.
            with torch.no_grad():
                logits = head(outputs.tokens[piece], outputs.hidden[piece])
            yield logits

    def head(self, forms: Mapping[str, OutputForm], device: torch.device = _CPU) -> "Head":
        """The modules after the blocks, in float32 on the device; `forms` are those of the blocks' outputs, by name."""
        given: list[Tensor] = []
        model = self.around({name: _giving_last(form, given) for name, form in forms.items()})
        return Head(model.to(device), given, device)

    def output_gradients(
        self, outputs: LastOutputs, loss: Callable[[Tensor], Tensor], *, device: torch.device = _CPU
    ) -> "LossGradient":
        """A loss of the logits, and its gradient at the last block's outputs.

        Args:
            outputs: The last block's outputs.
            loss: A function from the logits `[samples, length, vocabulary]` to a scalar.
            device: The device that the modules after the blocks are run on.
        """
        hidden = outputs.hidden.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(self.head(outputs.forms, device)(outputs.tokens, hidden))
            (gradient,) = torch.autograd.grad(value, hidden)
        return LossGradient(float(value.detach()), gradient)

    def around(self, forwards: Mapping[str, Forward]) -> PreTrainedModel:
        """A model whose blocks are replaced by functions, by name, and which computes in float32."""
        blocks = {name: self.meta_model.get_submodule(name) for name in forwards}
        replaced = [(block, Replacement(block, forwards[name])) for name, block in blocks.items()]
        model = meta_copy(self.meta_model, replaced=replaced)
        assert isinstance(model, PreTrainedModel)
        self._put_compressed(model, "")
        self._put_others(model, "")
        widen_activations(model)
        return model

    def _put_compressed(self, module: nn.Module, prefix: str) -> None:
        """Replace layers and embeddings of a module, whose name in the model is `prefix`, by compressed ones."""
        inside = f"{prefix}." if prefix else ""
        blocks = () if prefix else tuple(f"{name}." for name in blocks_of(self.meta_model))
        owners: dict[str, CompressedEmbedding] = {}
        for full, entry in self.embeddings.items():
            if full.startswith(inside) and not full.startswith(blocks):
                own = self._own(full, entry)
                embedding = CompressedEmbedding(entry.shape, entry.parts, own, torch.float32, factor=entry.factor)
                swap(module, full.removeprefix(inside), embedding)
                owners[full] = embedding
        for full, about in self.layers.items():
            if full.startswith(inside) and not full.startswith(blocks):
                bias = self._tensor(f"{full}.bias").float() if about.bias else None
                if about.tied_to is not None:
                    layer: CompressedLinear = TiedLinear(owners[about.tied_to], bias)
                else:
                    layer = CompressedLinear(about.shape, about.parts, self._own(full, about), bias)
                swap(module, full.removeprefix(inside), layer)

    def _put_others(self, module: nn.Module, prefix: str) -> None:
        packed = {id(t) for m in module.modules() for n in getattr(m, "packed_names", ()) for t in [getattr(m, n)]}
        packed |= {id(m.bias) for m in module.modules() if isinstance(m, CompressedLinear) and m.bias is not None}
        missing: dict[int, str] = {}
        for key, tensor in module.state_dict(keep_vars=True).items():
            full = f"{prefix}.{key}" if prefix else key
            if id(tensor) in packed:
                continue
            if full not in self.tensors:
                missing.setdefault(id(tensor), full)
                continue
            stored = self.tensors[full]
            tensor.data = stored.float() if stored.dtype == torch.float64 else stored
            packed.add(id(tensor))
        if lost := [full for own, full in missing.items() if own not in packed]:
            raise CheckpointError(f"{lost[0]} is missing: nothing is stored under that name")

    def _own(self, full: str, entry: StoredEntry) -> dict[str, Tensor]:
        return {name: self._tensor(f"{full}.{name}") for name in entry.tensors}

    def _tensor(self, full: str) -> Tensor:
        if full not in self.tensors:
            raise CheckpointError(f"{full} is missing: nothing is stored under that name")
        return self.tensors[full]


def stored_checkpoint(folder: Path, files: MappedFiles, about: Description) -> StoredModel:
    """A checkpoint that runs from its stored tensors.

    Args:
        folder: The checkpoint.
        files: Its weight files.
        about: What its config says of its layers and embeddings.
    """
    meta = _with_buffers(meta_model(folder, files.tensors), about.experts)
    return StoredModel(meta, files.tensors, files.release, about.layers, about.embeddings)


def _with_buffers(empty: PreTrainedModel, experts: Iterable[str]) -> PreTrainedModel:
    """The dense model with placeholder weights and computed buffers, with the experts of these modules taken apart."""
    config = empty.config
    given = {}
    for name, tensor in empty.state_dict().items():
        given[name] = placeholder(tensor.shape, torch.float32 if tensor.is_floating_point() else tensor.dtype)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with loading_settings():
        model = type(empty).from_pretrained(None, config=config, state_dict=given, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    for name in experts:
        take_apart(model, name)
    plain_outputs(model)
    return model.eval().requires_grad_(False)


def last_outputs(model: PreTrainedModel, blocks: Sequence[str], ids: Tensor) -> LastOutputs:
    """The outputs of a model's last block; logits are not computed.

    Args:
        model: A model in memory, or one around blocks that are made when they are run.
        blocks: The names of its blocks, in order.
        ids: Token ids `[samples, length]`.
    """
    forms: dict[str, OutputForm] = {}
    hidden: list[Tensor] = []

    def note(name: str, output: Any) -> None:
        forms[name] = OutputForm.of(output)
        hidden[:] = [hidden_of(output)]

    def noting(name: str) -> Callable[..., None]:
        return lambda _, __, output: note(name, output)

    handles = [model.get_submodule(name).register_forward_hook(noting(name)) for name in blocks]
    try:
        with torch.no_grad():
            model.base_model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return LastOutputs(ids, hidden[0], forms)


def giving(form: OutputForm, hidden: Tensor) -> Forward:
    """A block's forward that gives these hidden states `[samples, length, width]`, whatever its inputs are."""
    return lambda *_: form.around(hidden)


def _giving_last(form: OutputForm, given: Sequence[Tensor]) -> Forward:
    return lambda *_: form.around(given[-1])


class Head:
    """The modules of a model after its blocks, which give logits."""

    def __init__(self, model: PreTrainedModel, given: list[Tensor], device: torch.device) -> None:
        """Make it of a model whose blocks give the last of the `given` hidden states."""
        self._model, self._given, self._device = model, given, device

    def __call__(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits `[samples, positions, vocabulary]`; gradients pass to the hidden states.

        Args:
            tokens: Token ids `[samples, positions]`.
            hidden: The last block's outputs for them, `[samples, positions, width]`.
        """
        self._given[:] = [hidden.to(self._device)]
        logits: Tensor = self._model(tokens.to(self._device), use_cache=False).logits
        self._given.clear()
        return logits


class Replacement(nn.Module):
    """A block's replacement that runs a function; other attributes that a model reads are those of the meta model's block."""

    def __init__(self, shown: nn.Module, run: Forward) -> None:
        super().__init__()
        # In a tuple, so that the block does not become a part of this module.
        self._shown, self._run = (shown,), run

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_shown"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)
