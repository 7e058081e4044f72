"""A dense model whose weights stay in their files: a meta model, and blocks that are read when they are asked for.

The meta model has shapes and no values; `models.parameters` finds the tensor of the files for each of its parameters. Where
there is no such tensor, the whole model is loaded into memory, and a message says so.

Old .bin files are converted to safetensors first, one at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import CheckpointError, ModelError
from slimlm.core.profiling import profiled
from slimlm.events import Notify
from slimlm.models.files import safetensors_files
from slimlm.models.opening import (
    config_to_write,
    open_dense,
    open_tokenizer,
    read_config,
    refuse_foreign_code,
    refuse_quantized,
    weights_folder,
)
from slimlm.models.outputs import plain_outputs
from slimlm.models.parameters import FileTensors, Release, resolve_parameters
from slimlm.models.placeholders import drop_values, meta_copy
from slimlm.storage.mapping import MappedFiles

Made = TypeVar("Made")


@dataclass(frozen=True)
class LazyModel:
    """A model on the CPU whose tensors are read when they are asked for."""

    source: str
    folder: Path
    """where its files are: the folder given, or the hub's cache"""
    model: PreTrainedModel
    """the meta model: its parameters have shapes and no values"""
    tokenizer: PreTrainedTokenizerBase | None
    weights: dict[str, Tensor]
    """as stored, views of the files, by name in the model's state; float32 where the whole model had to be loaded"""
    dtypes: dict[str, torch.dtype]
    """of every tensor as stored, by name; casting back gives the stored values bit for bit"""
    release: Release
    """frees the memory pages of those of its tensors that are views of a file"""
    config: dict[str, Any]
    """as it is to be written with a checkpoint"""
    experts: list[str]
    """the names of the modules whose experts were taken apart into linear layers"""

    @property
    def bytes(self) -> int:
        """Size of its tensors as stored; tied tensors count once."""
        sizes = {t.data_ptr(): t.numel() * self.dtypes[name].itemsize for name, t in self.weights.items()}
        return sum(sizes.values())

    @property
    def whole_bytes(self) -> int:
        """Size of the model as `open_dense` loads it, in float32."""
        return sum({t.data_ptr(): t.numel() * 4 for t in self.weights.values()}.values())

    def stored(self, name: str) -> Tensor:
        """A tensor in the dtype in which it is stored."""
        return self.weights[name].to(self.dtypes[name])

    def fill(self, module: nn.Module, name: str) -> None:
        """Read the values, in float32, of a module of the meta model or a copy of one; `name` is its name in the model."""
        self._fill(module.state_dict(keep_vars=True), name)

    def _fill(self, tensors: dict[str, Tensor], name: str) -> None:
        for key, tensor in tensors.items():
            stored = self.weights[f"{name}.{key}" if name else key]
            tensor.data = stored.to(torch.float32 if stored.is_floating_point() else stored.dtype, copy=True)
            self.release([stored])

    def empty(self, module: nn.Module) -> None:
        """Free the values of a module of the meta model."""
        drop_values(module.state_dict(keep_vars=True).values())

    def block(self, name: str, device: torch.device) -> nn.Module:
        """A copy of a block with its values in float32, on the device; the meta model gets no values."""
        block = meta_copy(self.model.get_submodule(name))
        self.fill(block, name)
        return block.to(device)

    def iterate_blocks(self, names: Sequence[str], device: torch.device) -> Iterator[nn.Module]:
        """These blocks one after another, as `block` gives them; for a GPU the next one is copied while one is in use."""
        if device.type == "cpu":
            return (self.block(name, device) for name in names)
        return self._copied_ahead(names, device)

    def _copied_ahead(self, names: Sequence[str], device: torch.device) -> Iterator[nn.Module]:
        stream = torch.cuda.Stream(device)

        def copy_to_device(name: str) -> tuple[nn.Module, torch.cuda.Event]:
            block = self.block(name, torch.device("cpu"))
            with torch.cuda.stream(stream):
                for tensor in (*block.parameters(), *block.buffers()):
                    tensor.data = tensor.data.pin_memory().to(device, non_blocking=True)
                return block, stream.record_event()

        for block, copied in prefetched(copy_to_device, names):
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for tensor in (*block.parameters(), *block.buffers()):
                # So that its memory is not reused while operations enqueued on this stream still read it.
                tensor.record_stream(current)
            yield block

    def outside(self, blocks: Iterable[str]) -> list[str]:
        """The names of the tensors outside the blocks."""
        inside = tuple(f"{block}." for block in blocks)
        return [name for name in self.weights if not name.startswith(inside)]

    def outer_tensors(self, blocks: Iterable[str]) -> dict[str, Tensor]:
        """The meta model's tensors outside the blocks by name, except for those of an lm_head that is not tied.

        The model needs them to compute the inputs of its first block.
        """
        state = self.model.state_dict(keep_vars=True)
        head = self.model.get_output_embeddings()
        of_head = set() if head is None else {id(tensor) for tensor in head.state_dict(keep_vars=True).values()}
        uses = Counter(id(tensor) for tensor in state.values())
        outside = {name: state[name] for name in self.outside(blocks)}
        return {name: tensor for name, tensor in outside.items() if id(tensor) not in of_head or uses[id(tensor)] > 1}

    @contextmanager
    def outer_tensors_filled(self, blocks: Iterable[str]) -> Iterator[None]:
        """Within this context the tensors that `outer_tensors` gives have their values."""
        needed = self.outer_tensors(blocks)
        try:
            self._fill(needed, "")
            yield
        finally:
            drop_values(needed.values())


def prefetched(make: Callable[[str], Made], names: Sequence[str]) -> Iterator[Made]:
    """What `make` gives for each name in turn; a thread makes the next one while the caller uses one, at most one ahead."""
    with ThreadPoolExecutor(1) as maker:
        coming = [maker.submit(make, name) for name in names[:1]]
        for name in [*names[1:], None]:
            if not coming:
                return
            made = coming.pop().result()
            if name is not None:
                coming.append(maker.submit(make, name))
            yield made


@profiled("open")
def open_lazy(source: str, scratch: Path, notify: Notify) -> LazyModel:
    """Open a causal language model without reading its weights; code that comes with it is never run.

    Args:
        source: a folder, or a name on the hub.
        scratch: a folder for safetensors files made of old .bin files, created when it is needed.
        notify: receives a message where the whole model has to be loaded, and where an index is ignored because the single
            file that it would replace is there, too.

    Raises:
        ModelError: the model is missing, damaged, incomplete or already quantized.
    """
    config = read_config(source)
    refuse_quantized(config, source)
    refuse_foreign_code(config, source)
    folder = weights_folder(source)
    try:
        files = MappedFiles.of(safetensors_files(folder, scratch, notify), pass_over=True)
    except CheckpointError as error:
        raise ModelError(
            f"a weight file of {source} cannot be used ({error}); if it is damaged or cut short, download it again"
        ) from error
    release = files.release
    resolved = resolve_parameters(source, folder, FileTensors(files.tensors, files.unread, release))
    tokenizer = open_tokenizer(source)
    if resolved is None:
        notify(
            f"{source} is loaded as a whole: transformers makes some of its weights of several tensors of the files, in a way "
            "that slimlm does not know, so they cannot be read block by block"
        )
        return _from_dense(source, tokenizer)
    plain_outputs(resolved.model)
    return LazyModel(
        source,
        folder,
        resolved.model,
        tokenizer,
        resolved.weights,
        dtypes={name: tensor.dtype for name, tensor in resolved.weights.items()},
        release=release,
        config=config_to_write(folder, resolved.model),
        experts=resolved.experts,
    )


def _from_dense(source: str, tokenizer: PreTrainedTokenizerBase | None) -> LazyModel:
    """A model that is loaded as a whole, in the same form: its values are in `weights`, and in memory."""
    dense = open_dense(source)
    weights = {name: tensor.detach() for name, tensor in dense.model.state_dict().items()}
    drop_values(dense.model.state_dict(keep_vars=True).values())
    return LazyModel(
        source, dense.folder, dense.model, tokenizer, weights, dense.dtypes, lambda _: 0, dense.config, dense.experts
    )
