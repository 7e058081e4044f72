"""A dense model whose weights stay in their files: a meta model, and blocks that are read when they are asked for.

The meta model has shapes and no values; `models.parameters` finds the tensor of the files for each of its parameters. Tensors
that transformers makes of several of the files are made first, one at a time, and written to a file of their own.

Old .bin files are converted to safetensors first, one at a time, and weights that the files hold as codes are dequantized. Of a
GGUF file the config and the tokenizer are written as transformers' files, too.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimlm.core.errors import CheckpointError, ModelError
from slimlm.core.profiling import profiled
from slimlm.events import Notify
from slimlm.models.bin_files import read_bin
from slimlm.models.dequantize import READERS, Dequantized, identity, read_codes
from slimlm.models.files import as_safetensors, refuse_full_disk, weight_files
from slimlm.models.gguf_config import config_of
from slimlm.models.gguf_files import read_gguf, write_folder
from slimlm.models.gguf_header import described as described_types
from slimlm.models.gguf_header import is_gguf, open_gguf
from slimlm.models.opening import (
    config_to_write,
    open_tokenizer,
    quantization_of,
    read_config,
    refuse_adapter,
    refuse_foreign_code,
    refuse_quantized,
    weights_folder,
)
from slimlm.models.outputs import plain_outputs
from slimlm.models.parameters import FileTensors, Release, ResolvedModel, resolve_parameters
from slimlm.models.placeholders import drop_values, meta_copy
from slimlm.models.unplaced import Unplaced
from slimlm.storage.mapping import MappedFile, MappedFiles, map_file
from slimlm.storage.streams import NAMES, Described, described, write_stream

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
    """as stored, views of the files, by name in the model's state"""
    dtypes: dict[str, torch.dtype]
    """of every tensor as stored, by name; casting back gives the stored values bit for bit"""
    release: Release
    """frees the memory pages of those of its tensors that are views of a file"""
    config: dict[str, Any]
    """as it is to be written with a checkpoint"""
    experts: list[str]
    """the names of the modules whose experts were taken apart into linear layers"""
    files: list[Path]
    """the files of its weights"""
    listed: dict[str, str]
    """dtype and shape of every tensor of the files, "BF16 [48, 88]", by its name there"""
    unplaced: Unplaced
    """tensors of the files that the model's class has no place for; some are stored with a checkpoint as they are"""
    became: dict[str, tuple[str, ...]]
    """names in the files, and the names of what those tensors are or were made into, in the model or in `taken_apart`"""
    taken_apart: dict[str, tuple[str, ...]]
    """tensors of several experts that were made and then taken apart, and the names in the model's state of their parts"""
    converted: tuple[Path, ...]
    """the files that were made of old .bin files, of codes, and of tensors that transformers joins"""
    bits: dict[str, float]
    """of an element of every tensor, by name: as `dtypes` has them, but in a GGUF file, whose own are counted"""
    stored_as: str | None = None
    """the format of the codes that the files hold in place of weights, which were rounded to it; None: they hold weights"""

    @property
    def converted_bytes(self) -> int:
        """Size of the files that were made of the model's own."""
        return sum(path.stat().st_size for path in self.converted)

    @property
    def bytes(self) -> int:
        """Size of its tensors as stored, those that its class has no place for included; tied tensors count once."""
        sizes = {t.data_ptr(): t.numel() * self.bits[name] for name, t in self.weights.items()}
        return round(sum(sizes.values()) / 8) + self.unplaced.bytes

    @property
    def whole_bytes(self) -> int:
        """Size of the model as `open_dense` loads it: in float32, and what was converted in addition."""
        return sum({t.data_ptr(): t.numel() * 4 for t in self.weights.values()}.values()) + self.converted_bytes

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
def open_lazy(source: str, scratch: Path | None, notify: Notify) -> LazyModel:
    """Open a causal language model without reading its weights; code that comes with it is never run.

    Args:
        source: a folder, a name on the hub, a GGUF file or a folder with one.
        scratch: a folder for safetensors files made of old .bin files, of codes and of tensors that transformers joins, created
            when it is needed; None: these tensors are kept in memory, and the source is no GGUF file.
        notify: receives a message where tensors of the files have no place in the model's class, and where an index is ignored
            because the single file that it would replace is there, too.

    Raises:
        ModelError: the model is missing, damaged, incomplete, already quantized, or not all of its files can be used.
        DoesNotFitError: the disk of `scratch` is too small for converted files.
    """
    found = _open_gguf(source, scratch) if is_gguf(source) else _open_folder(source, scratch, notify)
    codes, files, folder = found.codes, found.files, found.folder
    if codes is not None:
        files = _dequantized(codes, scratch, identity(found.paths))
        if codes.form is not None:
            notify(
                f"the weights of {source} are already rounded ({codes.form}): they are dequantized to "
                f"{str(codes.dtype).removeprefix('torch.')}, and a compressed model cannot be closer to the original than these"
            )
    resolved = resolve_parameters(source, folder, files)
    if codes is not None:
        left_out = resolved.unplaced.left_out | codes.left_out
        unplaced = replace(resolved.unplaced, left_out=left_out)
        resolved = replace(resolved, unplaced=unplaced, became=codes.became(resolved.became))
    tokenizer = open_tokenizer(str(folder) if is_gguf(source) else source)
    if resolved.unplaced.message is not None:
        notify(resolved.unplaced.message)
    plain_outputs(resolved.model)
    return LazyModel(
        source,
        folder,
        resolved.model,
        tokenizer,
        resolved.weights,
        dtypes={name: tensor.dtype for name, tensor in resolved.weights.items()},
        release=files.release,
        config={key: value for key, value in config_to_write(folder, resolved.model).items() if key in found.settings},
        experts=resolved.experts,
        files=found.paths,
        listed=found.listed,
        unplaced=resolved.unplaced,
        became=resolved.became,
        taken_apart=resolved.taken_apart,
        bits=_bits(resolved, found.bits),
        converted=() if scratch is None else tuple(sorted(scratch.glob("*.safetensors"))),
        stored_as=None if codes is None else codes.form,
    )


@dataclass(frozen=True)
class _Found:
    """What a source holds, before codes are dequantized."""

    folder: Path
    """holds config and tokenizer"""
    paths: list[Path]
    """the files of the weights"""
    settings: set[str]
    """the keys of the config that are written with a checkpoint"""
    files: FileTensors
    """the tensors of the files"""
    listed: dict[str, str]
    """dtype and shape of each, by its name"""
    codes: Dequantized | None
    """what replaces the tensors of the files; None: they are weights"""
    bits: dict[str, float] = field(default_factory=dict)
    """of an element of each tensor of a GGUF file, by its name there"""


def _open_folder(source: str, scratch: Path | None, notify: Notify) -> _Found:
    """What a folder or a name on the hub holds; see `open_lazy`."""
    config = read_config(source)
    about = quantization_of(config, source)
    coded = str(about.get("quant_method")) in READERS
    others = {key: value for key, value in config.items() if not coded or key != "quantization_config"}
    refuse_quantized(others, source)
    refuse_foreign_code(config, source)
    folder = weights_folder(source)
    refuse_quantized(others, source, None if coded else folder)
    refuse_adapter(folder, source)
    paths = weight_files(folder, notify)
    try:
        files = _file_tensors(paths, scratch)
    except CheckpointError as error:
        raise ModelError(
            f"a weight file of {source} cannot be used ({error}); if it is damaged or cut short, download it again"
        ) from error
    codes = read_codes(source, config, about, files) if coded else None
    return _Found(folder, paths, set(others), files, _listed(files), codes)


def _open_gguf(source: str, scratch: Path | None) -> _Found:
    """What a GGUF file holds; config and tokenizer are written to a folder in `scratch`."""
    assert scratch is not None, "a GGUF file's config and tokenizer are written to a folder"
    gguf, folder = open_gguf(source), scratch / "gguf"
    write_folder(gguf, folder)
    mapped = gguf.mapped()
    files = FileTensors(mapped.tensors, {}, mapped.release, _in_memory)
    codes = read_gguf(gguf, folder, files)
    listed, bits = described_types(gguf.tensors.values()), {name: tensor.bits for name, tensor in gguf.tensors.items()}
    return _Found(folder, gguf.paths, set(config_of(gguf)), files, listed, codes, bits)


def _bits(resolved: ResolvedModel, of_files: Mapping[str, float]) -> dict[str, float]:
    """The bits of an element of every tensor by name; `of_files` has those of tensors of the files, where they are counted."""
    own = {name: of_files[tensor] for tensor, names in resolved.became.items() if tensor in of_files for name in names}
    return {name: own.get(name, 8.0 * tensor.dtype.itemsize) for name, tensor in resolved.weights.items()}


def _listed(files: FileTensors) -> dict[str, str]:
    """Dtype and shape of every tensor of the files, by its name; of dtypes that slimlm does not read the size in bytes."""
    read = {name: f"{NAMES[tensor.dtype]} {list(tensor.shape)}" for name, tensor in files.stored.items()}
    return read | {name: f"{dtype}, {raw.numel()} bytes" for name, (dtype, raw) in files.unread.items()}


def _file_tensors(paths: list[Path], scratch: Path | None) -> FileTensors:
    """The tensors of weight files, none of them read yet."""
    if scratch is None and paths[0].suffix != ".safetensors":
        loaded = {name: tensor for path in paths for name, tensor in read_bin(path).items()}
        return FileTensors(loaded, {}, lambda _: None, _in_memory)
    files = MappedFiles.of(as_safetensors(paths, scratch) if scratch is not None else paths, pass_over=True)
    if scratch is None:
        return FileTensors(files.tensors, files.unread, files.release, _in_memory)
    made = _MadeFile(scratch / "made.safetensors", files.release)
    return FileTensors(files.tensors, files.unread, made.release, made.keep)


def _dequantized(codes: Dequantized, scratch: Path | None, of: str) -> FileTensors:
    """The tensors of the files with weights in place of codes, in memory or in a file; `of` tells the files from others."""
    if scratch is None:
        return codes.replaced(codes.whole(), codes.files.release)
    weights = _MadeFile(scratch / "dequantized.safetensors", codes.files.release, {"of": of})
    kept = weights.keep(codes.described, codes.pieces())
    made = _MadeFile(scratch / "made.safetensors", weights.release)
    return replace(codes.replaced(kept, made.release), keep=made.keep)


def _in_memory(about: Described, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip(about, tensors, strict=True))


class _MadeFile:
    """A file for tensors that are made of others, and the release of its pages and of those of the files they are made of."""

    def __init__(self, path: Path, release: Release, metadata: dict[str, str] | None = None) -> None:
        self._path = path
        self._release = release
        self._metadata = metadata or {}
        self._file: MappedFile | None = None

    def keep(self, about: Described, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
        """The tensors as views of the file, which is written unless an earlier run has written the same."""
        if not self._holds(about):
            refuse_full_disk(self._path.parent, sum(math.prod(shape) * dtype.itemsize for dtype, shape in about.values()))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_stream(self._path, about, tensors, self._metadata)
        self._file = map_file(self._path)
        return dict(self._file.tensors)

    def _holds(self, about: Described) -> bool:
        """Whether an earlier run has written these tensors."""
        if not self._path.is_file():
            return False
        file = map_file(self._path)
        return described(file.tensors) == about and file.metadata == self._metadata

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Drop the memory pages of those of these tensors, of any shapes `[...]`, that are views of the files."""
        views = list(tensors)
        self._release(views)
        if self._file is not None:
            self._file.release(views)
