"""What transformers' model classes become when they are opened from a checkpoint.

A method of transformers that asks a parameter for the model's dtype, or takes the state dictionary for all that there is to a
model, answers wrongly for packed layers. `CompressedModel` gives these methods for every class of transformers; an opened model
is of a class that has it in front of its own, under the same name, so that `isinstance` and a class's name say what they said.
"""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimlm.core.errors import ModelError, SlimlmError
from slimlm.models.opening import quantization_of, read_config
from slimlm.runtime.dense import WideEmbedding, widen_activations
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import activation_dtype
from slimlm.storage import checkpoint
from slimlm.storage.entries import parse_description
from slimlm.storage.mapping import MappedFiles


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was opened from, as far as saving needs it."""

    folder: Path
    """The checkpoint's folder."""
    record: dict[str, Any]
    """The content of slimlm.json when the model was opened."""
    dtypes: dict[str, torch.dtype]
    """The dtype of each stored tensor, by name."""
    dtype: str | None
    """The dtype in config.json."""
    others: tuple[str, ...]
    """The names of stored tensors for which the model's class has no place, and which no model holds."""

    @classmethod
    def of(cls, folder: Path) -> "Origin":
        """Read record, headers of weight files and config; raises CheckpointError where one is missing or damaged."""
        files = MappedFiles.of(checkpoint.check_files(folder))
        dtypes = {name: tensor.dtype for name, tensor in files.tensors.items()}
        config = read_config(str(folder))
        others = parse_description(quantization_of(config, str(folder)), folder).others
        dtype = config.get("dtype") or config.get("torch_dtype")
        return cls(folder.absolute(), checkpoint.read_record(folder), dtypes, dtype, others)


class CompressedModel(PreTrainedModel):
    """A model with packed layers; `compressed_class` puts it in front of a class of transformers."""

    origin: Origin | None = None
    """Where the model was opened from; None: it is a part of an opened model, or its folder has no record."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations, in which the model computes; embeddings may be stored in another."""
        return _activation_dtype(self) or super().dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights and biases that the model stands for, as of the original; tied ones count once.

        Args:
            only_trainable: count parameters that can be trained, which excludes packed weights.
            exclude_embeddings: leave out input embeddings.
        """
        if only_trainable:
            return super().num_parameters(only_trainable=True, exclude_embeddings=exclude_embeddings)
        tables = [m for m in self.modules() if isinstance(m, nn.Embedding | CompressedEmbedding)]
        left_out = {id(p) for m in tables for p in m.parameters(recurse=False)} if exclude_embeddings else set()
        dense = sum(p.numel() for p in self.parameters() if id(p) not in left_out)
        layers = [m for m in self.modules() if isinstance(m, CompressedLinear) and m.packed_names]
        packed = sum(m.out_features * m.in_features for m in layers)
        if not exclude_embeddings:
            packed += sum(m.num_embeddings * m.embedding_dim for m in tables if isinstance(m, CompressedEmbedding))
        return dense + packed

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the number of tokens, as transformers does, of embeddings that are not packed.

        Raises:
            ModelError: the input embedding or the head is packed; nothing is changed then.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        packed = [module for module in (embedding, head) if isinstance(module, CompressedEmbedding | CompressedLinear)]
        if packed:
            rows = {m.num_embeddings if isinstance(m, CompressedEmbedding) else m.out_features for m in packed}
            step = pad_to_multiple_of or 1
            if rows == {-(-(new_num_tokens or max(rows)) // step) * step}:
                return embedding
            names = {id(module): name for name, module in self.named_modules()}
            raise ModelError(
                f"{names[id(packed[0])]} is packed ({packed[0].entries.summary()}), and rows cannot be added to or taken from "
                "packed weights. Resize the original model and compress that one, or compress the original without "
                "`embedding_bits`: embedding and head then stay as they are and can be resized"
            )
        resized = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self._round_as_stored()
        return resized

    def _round_as_stored(self) -> None:
        """Round embedding and head to the dtype that they are stored in, as their new rows may have any values."""
        matrices = [m.weight for m in (self.get_input_embeddings(), self.get_output_embeddings()) if m is not None]
        for name, tensor in self.state_dict(keep_vars=True).items():
            stored = None if self.origin is None else self.origin.dtypes.get(name)
            if stored is None or torch.promote_types(stored, tensor.dtype) != tensor.dtype:
                continue
            if any(tensor is matrix for matrix in matrices):
                tensor.data = tensor.data.to(stored).to(tensor.dtype)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the input embedding; one of 16 bits is made to give the activations that the model computes with."""
        wide = _widens(self)
        super().set_input_embeddings(value)
        if wide:
            widen_activations(self)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the output head; one of 16 bits is made to take the activations that the model computes with."""
        wide = _widens(self)
        super().set_output_embeddings(new_embeddings)
        if wide:
            widen_activations(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any) -> None:
        """Write a checkpoint that opens, like the one that this model was opened from; arguments are those of transformers.

        The files of an earlier checkpoint in the folder, which may be the model's own, are replaced when the new ones are
        complete. Tokenizer files come from the original checkpoint, unless the folder has them.

        Raises:
            CheckpointError: what is asked for cannot be written, or the folder holds something else; nothing is changed then.
        """
        from slimlm.inference.saving import Wanted, refuse_saving, save

        if getattr(self, "_hf_peft_config_loaded", False):
            # Transformers writes the adapters alone then.
            super().save_pretrained(save_directory, *arguments, **options)
            return
        wanted = Wanted.of(inspect.signature(super().save_pretrained).bind(save_directory, *arguments, **options))
        origin = refuse_saving(self, wanted)
        if wanted.here:
            save(self, origin, wanted)
            if wanted.push is not None:
                self.push_to_hub(**wanted.push)

    def push_to_hub(self, *arguments: Any, **options: Any) -> str:
        """Upload the model as `save_pretrained` writes it; arguments are those of transformers."""
        from slimlm.inference.saving import refuse_saving

        refuse_saving(self)
        return str(super().push_to_hub(*arguments, **options))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copies and pickles, which find the class of transformers by its name and this one from it."""
        _, (kind, *rest), *state = super().__reduce_ex__(max(2, int(protocol)))
        assert not rest, "modules are made without arguments"
        return _empty, (_own_class(kind),), *state


def compressed_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of models that are opened as one of transformers' classes; the same one each time."""
    if issubclass(kind, CompressedModel):
        return kind
    if kind not in _CLASSES:
        own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        # Transformers would take the config's class from the first base.
        made = type(kind.__name__, (CompressedModel, kind), {**own, "config_class": kind.config_class})
        # Of two threads, both take the class of the first.
        _CLASSES.setdefault(kind, made)
    return _CLASSES[kind]


_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
"""What `compressed_class` made, by the class of transformers."""


def _own_class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that `compressed_class` made this one from."""
    return next(base for base in kind.__mro__[1:] if base is not CompressedModel and issubclass(base, PreTrainedModel))


def _empty(kind: type[PreTrainedModel]) -> PreTrainedModel:
    """A model without modules, whose state is set next."""
    return object.__new__(compressed_class(kind))


def become_compressed(model: PreTrainedModel, origin: Origin | None) -> None:
    """Give a model, and the models inside it, the methods of `CompressedModel`; `origin` is where the model was opened from."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = compressed_class(type(module))
    if not isinstance(model, CompressedModel):
        raise SlimlmError(f"{type(model).__name__} cannot be opened with packed layers")
    model.origin = origin


def _widens(model: PreTrainedModel) -> bool:
    """Whether the model computes in float32 with embeddings or linear layers of 16 bits."""
    return model.dtype == torch.float32


def _activation_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """The dtype of the input embedding's output where the embedding casts it; None: it does not."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return activation_dtype(model) if isinstance(embedding, WideEmbedding | CompressedEmbedding) else None
