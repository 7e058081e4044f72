"""Activations between blocks: in memory, or in files that are read a batch at a time.

Activations are `[samples, length, width]` per batch. The inputs of the next block are always written to a file, so that a run
can be resumed; whether they stay in memory as well is decided once per run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import overload

from torch import Tensor

from slimlm.storage.mapping import TEMPORARY, MappedFile, map_and_unlink, map_file
from slimlm.storage.streams import write_stream


class FileBatches(Sequence[Tensor]):
    """Activations in a file, a batch `[samples, length, width]` at a time: each access reads a copy."""

    def __init__(self, file: MappedFile, name: str, batch: int, share: slice) -> None:
        """Make batches of a file's tensor.

        Args:
            file: The file.
            name: The tensor's name.
            batch: Samples per batch.
            share: The samples of the file that are used.
        """
        self._file = file
        self._batches = file.tensors[name][share].split(batch)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> list[Tensor]: ...
    def __getitem__(self, which: int | slice) -> Tensor | list[Tensor]:
        if isinstance(which, slice):
            return [self[i] for i in range(len(self))[which]]
        view = self._batches[which]
        copy = view.clone()
        self._file.release([view])
        return copy


@dataclass(frozen=True)
class ActivationStore:
    """The activations of a process, in memory or in files."""

    folder: Path
    """The folder of the files; the journal's, on the first rank."""
    in_memory: bool
    """Whether activations stay in memory in addition to their file."""

    def hold(self, name: str, batches: Iterable[Tensor], count: int) -> Sequence[Tensor]:
        """Hold `count` samples, `[samples, length, width]` per batch, in memory or in an unlinked file."""
        if self.in_memory:
            return list(batches)
        source = iter(batches)
        first = next(source)
        path = self.folder / f"{name}{TEMPORARY}"
        write_stream(path, {name: (first.dtype, (count, *first.shape[1:]))}, chain([first], source))
        return FileBatches(map_and_unlink(path), name, len(first), slice(count))

    def write(
        self, path: Path, own: Mapping[str, Iterable[Tensor]], shares: tuple[int, ...], others: Callable[[], Iterable[Tensor]]
    ) -> tuple[str, dict[str, Sequence[Tensor]]]:
        """Write the activations of all ranks to one file.

        Args:
            path: The file; it appears when it is complete.
            own: This rank's activations by name, `[samples, length, width]` per batch; each is written when it is computed.
            shares: The number of samples of each rank; this rank's come first.
            others: Called after each of `own`; gives the activations of that name that the other ranks send, in their order.

        Returns:
            The file's SHA-256, and this rank's activations, in memory or from the file.
        """
        sources = {name: iter(stream) for name, stream in own.items()}
        first = next(sources[next(iter(sources))])
        held: dict[str, list[Tensor]] = {name: [] for name in sources}

        def pieces() -> Iterator[Tensor]:
            for number, (name, source) in enumerate(sources.items()):
                for piece in chain([first] if number == 0 else [], source):
                    if self.in_memory:
                        held[name].append(piece)
                    yield piece
                yield from others()

        layout = dict.fromkeys(sources, (first.dtype, (sum(shares), *first.shape[1:])))
        checksum = write_stream(path, layout, pieces())
        return checksum, dict(held) if self.in_memory else self.read(path, len(first), slice(shares[0]))

    def read(self, path: Path, batch: int, share: slice) -> dict[str, Sequence[Tensor]]:
        """These samples of a file of activations by name, `batch` samples at a time, from the file."""
        file = map_file(path)
        return {name: FileBatches(file, name, batch, share) for name in file.tensors}

    def load(self, path: Path, batch: int, share: slice) -> dict[str, Sequence[Tensor]]:
        """As `read`, in memory where activations stay there."""
        found = self.read(path, batch, share)
        return {name: list(batches) for name, batches in found.items()} if self.in_memory else found
