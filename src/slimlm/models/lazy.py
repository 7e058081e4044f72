"""A dense model whose weights stay in their files: a skeleton, and blocks that are filled when their turn comes.

Transformers fills the skeleton with placeholders (tensors of the right shape that take no memory), so what a file's tensor is
called in the model, which are tied, and what a model computes for itself (rotary tables) is up to transformers. Experts that
transformers would stack into one tensor stay the tensors of the files that they are (models/joining.py). Where a model's files
need more than that, it is opened whole, which is told.

Old .bin files are converted to safetensors first, one at a time, and only read as tensors (weights_only).
"""

import copy
import json
import pickle
import pickletools
import zipfile
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
from slimlm.models.experts import Share, fused_in, take_apart
from slimlm.models.meta import empty_model
from slimlm.models.opening import (
    open_dense,
    open_tokenizer,
    own_config,
    read_config,
    refuse_foreign_code,
    refuse_missing,
    refuse_quantized,
    weights_folder,
    without_bars,
    words_of,
)
from slimlm.models.stacked_experts import Stack, stacks_in, taken_as_they_are, taken_of
from slimlm.storage.mapping import MappedFiles, unknown_dtype
from slimlm.storage.streams import KINDS, is_plain_name, write_tensors

Release = Callable[[Iterable[Tensor]], Any]
Made = TypeVar("Made")
INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class StreamedModel:
    """A model on the CPU, of which only those weights are in memory that are needed at the moment."""

    source: str
    folder: Path
    """where its files are: the folder given, or the hub's cache"""
    model: PreTrainedModel
    """the skeleton: its parameters have shapes and no values"""
    tokenizer: PreTrainedTokenizerBase | None
    weights: dict[str, Tensor]
    """as stored, views of the files, by name in the model's state; float32 where the model had to be opened whole"""
    dtypes: dict[str, torch.dtype]
    """of every tensor as stored, by name; casting back gives the stored values bit for bit"""
    release: Release
    """drops the pages of those of these tensors that are views of a file"""
    config: dict[str, Any]
    experts: list[str]
    """the names of the modules that hold experts, where these were taken apart"""

    @property
    def bytes(self) -> int:
        """Size of its tensors as stored; tied tensors count once."""
        sizes = {t.data_ptr(): t.numel() * self.dtypes[name].itemsize for name, t in self.weights.items()}
        return sum(sizes.values())

    @property
    def whole_bytes(self) -> int:
        """Size of the model as `open_dense` opens it, all of it in float32."""
        return sum({t.data_ptr(): t.numel() * 4 for t in self.weights.values()}.values())

    def stored(self, name: str) -> Tensor:
        """A tensor in the dtype in which it is stored."""
        return self.weights[name].to(self.dtypes[name])

    def fill(self, module: nn.Module, name: str) -> None:
        """Give a part of the skeleton, or a copy of it, its values in float32; `name` is the module's in the model."""
        self._put(module.state_dict(keep_vars=True), name)

    def _put(self, tensors: dict[str, Tensor], name: str) -> None:
        for key, tensor in tensors.items():
            stored = self.weights[f"{name}.{key}" if name else key]
            tensor.data = stored.to(torch.float32 if stored.is_floating_point() else stored.dtype, copy=True)
            self.release([stored])

    def empty(self, module: nn.Module) -> None:
        """Take the values of a part of the skeleton out of memory."""
        _take(module.state_dict(keep_vars=True).values())

    def block(self, name: str, device: torch.device) -> nn.Module:
        """A block of its own, with its values in float32, on the device; the skeleton stays as it is."""
        block = skeleton_copy(self.model.get_submodule(name))
        self.fill(block, name)
        return block.to(device)

    def coming(self, names: Sequence[str], device: torch.device) -> Iterator[nn.Module]:
        """These blocks in turn, as `block` gives them; for a card the next one is read and copied while one is worked on."""
        if device.type == "cpu":
            return (self.block(name, device) for name in names)
        return self._sent(names, device)

    def _sent(self, names: Sequence[str], device: torch.device) -> Iterator[nn.Module]:
        stream = torch.cuda.Stream(device)

        def send(name: str) -> tuple[nn.Module, torch.cuda.Event]:
            block = self.block(name, torch.device("cpu"))
            with torch.cuda.stream(stream):
                for tensor in (*block.parameters(), *block.buffers()):
                    tensor.data = tensor.data.pin_memory().to(device, non_blocking=True)
                return block, stream.record_event()

        for block, copied in ahead(send, names):
            here = torch.cuda.current_stream(device)
            here.wait_event(copied)
            for tensor in (*block.parameters(), *block.buffers()):
                # So that its memory is not given away while work that was begun here still reads it.
                tensor.record_stream(here)
            yield block

    def outside(self, blocks: Iterable[str]) -> list[str]:
        """The names of the tensors outside the blocks."""
        inside = tuple(f"{block}." for block in blocks)
        return [name for name in self.weights if not name.startswith(inside)]

    def ends(self, blocks: Iterable[str]) -> dict[str, Tensor]:
        """The skeleton's tensors outside the blocks, by name, but for an output head that is tied to nothing."""
        state = self.model.state_dict(keep_vars=True)
        head = self.model.get_output_embeddings()
        own = set() if head is None else {id(tensor) for tensor in head.state_dict(keep_vars=True).values()}
        uses = Counter(id(tensor) for tensor in state.values())
        outside = {name: state[name] for name in self.outside(blocks)}
        return {name: tensor for name, tensor in outside.items() if id(tensor) not in own or uses[id(tensor)] > 1}

    @contextmanager
    def ends_filled(self, blocks: Iterable[str]) -> Iterator[None]:
        """Meanwhile those have their values."""
        needed = self.ends(blocks)
        try:
            self._put(needed, "")
            yield
        finally:
            _take(needed.values())

    @contextmanager
    def blocks_in_turn(self, blocks: dict[str, nn.Module]) -> Iterator[None]:
        """Meanwhile each block of the skeleton has its values while it runs."""
        handles = []
        for name, block in blocks.items():
            handles += [
                block.register_forward_pre_hook(lambda module, _, name=name: self.fill(module, name)),
                block.register_forward_hook(lambda module, _, __: self.empty(module)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block in blocks.values():
                self.empty(block)


def ahead(make: Callable[[str], Made], names: Sequence[str]) -> Iterator[Made]:
    """What is made of each name in turn, the next one by a thread of its own while the caller has one; never two ahead."""
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
def open_streamed(source: str, scratch: Path, notify: Notify) -> StreamedModel:
    """Open a causal language model without reading its weights; nothing is trusted to run code.

    scratch: a folder for what old .bin files are converted to, made when it is needed. notify: hears where the model has to be
    opened whole, and of an index beside the file that is read. Raises ModelError for a missing, damaged, incomplete or already
    quantized model.
    """
    config = read_config(source)
    refuse_quantized(config, source)
    refuse_foreign_code(config, source)
    folder = weights_folder(source)
    try:
        files = MappedFiles.of(safetensors_of(folder, scratch, notify), pass_over=True)
    except CheckpointError as error:
        raise ModelError(
            f"a weight file of {source} cannot be used ({error}); if it is damaged or cut short, download it again"
        ) from error
    release = files.release
    found = _skeleton(source, folder, files.tensors, files.unread, release)
    tokenizer = open_tokenizer(source)
    if found is None:
        notify(
            f"{source} is opened whole: transformers makes some of its weights of several tensors of the files, in a way that "
            "slimlm does not know, so they cannot be read block by block"
        )
        return _streamed_from_whole(source, tokenizer)
    model, weights, experts = found
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    own = own_config(folder, model)
    return StreamedModel(source, folder, model, tokenizer, weights, dtypes, release, own, experts)


def _skeleton(
    source: str, folder: Path, stored: dict[str, Tensor], unread: dict[str, tuple[str, Tensor]], release: Release
) -> tuple[PreTrainedModel, dict[str, Tensor], list[str]] | None:
    """The model with placeholders, the tensors of the files by its names, and its experts; None where there is more to it.

    unread: tensors of dtypes that slimlm does not read; raises ModelError where the model takes one.
    """
    try:
        empty = empty_model(folder, stored | {name: raw for name, (_, raw) in unread.items()})
        for name in taken_of(empty, unread)[:1]:
            raise ModelError(f"{name} in the files of {source} {unknown_dtype(unread[name][0])}")
        stacks = {name: s for name, s in stacks_in(empty, stored).items() if s.shape(stored) is not None}
        names = taken_as_they_are(empty, stored)
        _refuse_other_shapes(source, empty, names, stored)
        given, keys = _placeholders(stored, stacks, _untied(empty, names, stored, release))
        with without_bars():
            model, info = type(empty).from_pretrained(
                None, config=empty.config, state_dict=given, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source} cannot be opened as a causal language model: {words_of(error)}") from error
    refuse_missing(info, source, type(model).__name__)
    weights = {name: keys.get(tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    experts = fused_in(model)
    shares = {name: share for fused in experts for name, share in take_apart(model, fused).items()}
    found = {}
    for name in model.state_dict():
        key = weights[shares[name].fused] if name in shares else weights[name]
        tensor = None if key is None else _tensor_of(key, shares.get(name), stored, stacks)
        if tensor is None:
            return None
        found[name] = tensor
    return model.eval().requires_grad_(False), found, experts


def _refuse_other_shapes(source: str, empty: PreTrainedModel, names: dict[str, str], stored: dict[str, Tensor]) -> None:
    """Raise ModelError where a tensor of the files has another shape than in the model; `names`: its name in the files."""
    state = empty.state_dict()
    odd = [(own, name) for own, name in names.items() if stored[name].shape != state[own].shape]
    if odd:
        own, name = odd[0]
        more = f" ({len(odd) - 1} more do not fit either)" if len(odd) > 1 else ""
        raise ModelError(
            f"{name} in the files of {source} has the shape {list(stored[name].shape)}; by the config, {type(empty).__name__} "
            f"has it in the shape {list(state[own].shape)}{more}. Config and weights belong to different models, or one was "
            "changed: download both again"
        )


def _untied(empty: PreTrainedModel, names: dict[str, str], stored: dict[str, Tensor], release: Release) -> set[str]:
    """Names in the files of tensors that the config ties to others, although the files hold both and they differ."""
    found = set()
    for one, other in empty.get_expanded_tied_weights_keys(all_submodels=True).items():
        if one in names and other in names and not _equal(stored[names[one]], stored[names[other]], release):
            found.add(names[one])
    return found


def _equal(one: Tensor, other: Tensor, release: Release) -> bool:
    """Whether transformers finds these equal in float32, as it compares tied tensors; a few rows of them are read at once."""
    if one.shape != other.shape:
        return False
    try:
        pairs = zip(one.split(_ROWS_AT_ONCE), other.split(_ROWS_AT_ONCE), strict=True) if one.ndim else [(one, other)]
        return all(torch.equal(a.float(), b.float()) for a, b in pairs)
    finally:
        release([one, other])


def _placeholders(
    stored: dict[str, Tensor], stacks: dict[str, Stack], untied: set[str]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Placeholders for the tensors of the files, or for what they are stacked into, by name, and their names by address.

    Transformers ties what has equal values: those of the tensors in `untied` are ones, all others are zeros.
    """
    stacked = {name for stack in stacks.values() for name in stack.names()}
    like = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items() if name not in stacked}
    for name, stack in stacks.items():
        like[name] = stack.shape(stored) or (), stored[stack.names()[0]].dtype
    given = {
        name: placeholder(shape, torch.float32 if dtype.is_floating_point else dtype, int(name in untied))
        for name, (shape, dtype) in like.items()
    }
    return given, {tensor.data_ptr(): name for name, tensor in given.items()}


def _tensor_of(key: str, share: Share | None, stored: dict[str, Tensor], stacks: dict[str, Stack]) -> Tensor | None:
    """A tensor of the model, or its share of one: a view of the files; None where it is a view of none."""
    if key not in stacks:
        return stored[key] if share is None else share.view(stored[key][share.expert])
    return None if share is None else stacks[key].share(share, stored)


def placeholder(shape: Iterable[int], dtype: torch.dtype, value: int = 0) -> Tensor:
    """A tensor of this shape and this value that takes no memory."""
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


def skeleton_copy(module: nn.Module) -> nn.Module:
    """A copy of a part of a skeleton, as empty as it is: deepcopy alone would give every parameter memory of its own."""
    memo: dict[int, Any] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        empty = placeholder(tensor.shape, tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _take(tensors: Iterable[Tensor]) -> None:
    """Leave these their shapes and nothing else."""
    for tensor in tensors:
        tensor.data = placeholder(tensor.shape, tensor.dtype)


def _streamed_from_whole(source: str, tokenizer: PreTrainedTokenizerBase | None) -> StreamedModel:
    dense = open_dense(source)
    weights = {name: tensor.detach() for name, tensor in dense.model.state_dict().items()}
    _take(dense.model.state_dict(keep_vars=True).values())
    return StreamedModel(
        source, dense.folder, dense.model, tokenizer, weights, dense.dtypes, lambda _: 0, dense.config, dense.experts
    )


def weight_files(folder: Path, notify: Notify | None = None) -> list[Path]:
    """The files that hold a model's weights, safetensors before .bin; raises ModelError where there are none.

    As transformers does, the single file is taken before those that an index lists, and these before any others: a repository
    may hold the same weights a second time under other names. notify: hears of an index that is passed over.
    """
    for index, one, pattern in (
        (INDEX, "model.safetensors", "*.safetensors"),
        (BIN_INDEX, "pytorch_model.bin", "pytorch_model*.bin"),
    ):
        if (folder / one).is_file():
            if notify is not None and (folder / index).is_file():
                notify(
                    f"{folder} holds both {one} and {index}; as transformers does, {one} is read and the index is not. If the "
                    f"files of the index are the ones that you mean, take {one} away"
                )
            return [folder / one]
        if (folder / index).is_file():
            return [folder / name for name in _indexed(folder / index)]
        if found := sorted(folder.glob(pattern)):
            return found
    raise ModelError(f"{folder} holds no weights: no safetensors file and no pytorch_model.bin")


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged ({error}); download it again") from error
    for name in names:
        if not is_plain_name(name):
            raise ModelError(f"{index} names a weight file outside the folder: {name!r}")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing, which the index names; download the model again")
    return names


def safetensors_of(folder: Path, scratch: Path, notify: Notify | None = None) -> list[Path]:
    """The weight files; old .bin files converted one at a time into `scratch`, where that was not done yet."""
    files = []
    for path in weight_files(folder, notify):
        if path.suffix == ".safetensors":
            files.append(path)
            continue
        converted = scratch / f"{path.stem}.safetensors"
        if not converted.is_file():
            scratch.mkdir(parents=True, exist_ok=True)
            write_tensors(converted, _tensors_of_bin(path))
        files.append(converted)
    return files


def _refuse_larger_inside(path: Path) -> None:
    """Raise ModelError where a .bin file speaks of more bytes than it has, before torch makes room for them.

    Torch stores what its archives hold as it is; files of torch before 1.6 begin with pickles, the fourth of which gives sizes.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                odd = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED or i.file_size > size]
                odd += [name for name in archive.namelist() if name.startswith("/") or ".." in name.split("/")]
        else:
            with path.open("rb") as file:
                pickles = [list(pickletools.genops(file)) for _ in range(4)]
            odd = [str(number) for _, number, _ in pickles[-1] if isinstance(number, int) and number > size]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged, or no file of torch's ({words_of(error)}); download it again") from error
    if odd:
        raise ModelError(
            f"{path} holds what torch does not write ({odd[0]}): more than the file has room for, packed, or outside of it. "
            "It is not opened; download it again, or convert the model to safetensors"
        )


def _no_tensors(path: Path, found: dict[Any, Any]) -> str:
    """What a refusal says of a .bin file whose dictionary holds no tensor itself."""
    keys = ", ".join(repr(str(key)) for key in list(found)[:5]) + (", ..." if len(found) > 5 else "")
    said = f"{path} holds no tensors by name, but {f'the keys {keys}' if found else 'nothing'}"
    inner = [key for key, value in found.items() if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))]
    if not inner:
        return f"{said}; download it again, or give a model as save_pretrained writes it"
    return (
        f"{said}: the tensors are under {str(inner[0])!r}, as a training program saves them. Save these alone: "
        f"torch.save(torch.load(file, weights_only=True)[{inner[0]!r}], file)"
    )


def _tensors_of_bin(path: Path) -> dict[str, Tensor]:
    _refuse_larger_inside(path)
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{path} is damaged, or holds more than tensors, which slimlm does not run ({words_of(error)}); download it again, "
            "or convert the model to safetensors"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__} where tensors by name were expected")
    tensors = {str(name): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise ModelError(_no_tensors(path, found))
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS.values():
            raise ModelError(f"{name} in {path} {unknown_dtype(str(tensor.dtype))}")
    return tensors
