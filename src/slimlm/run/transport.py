"""The activations of a run: each rank holds those of its own samples, and the first rank's journal stores all of them.

The file of activations therefore is complete, and any number of ranks can resume with it. A single process uses the same code
and sends nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from slimlm.distributed.group import Group
from slimlm.storage.activations import ActivationStore
from slimlm.storage.journal import BlockContent, Journal, StoredFile
from slimlm.storage.mapping import map_file


@dataclass(frozen=True)
class ActivationTransport:
    """Passes activations between the ranks, and between them and the journal."""

    journal: Journal
    """The journal of the run; on ranks other than the first a copy."""
    store: ActivationStore
    """The store of this rank's activations."""
    group: Group
    """The ranks of the run."""
    shares: tuple[int, ...]
    """The number of samples of each rank; a rank's samples are consecutive."""

    @property
    def own_count(self) -> int:
        """The number of this rank's samples."""
        return self.shares[self.group.rank]

    def own(self, samples: Tensor) -> Tensor:
        """This rank's part of all samples `[count, length]`."""
        return samples.split(self.shares)[self.group.rank]

    def begin(self, streams: Mapping[str, Iterable[Tensor]]) -> dict[str, Sequence[Tensor]]:
        """Store the inputs of the first block, in batches `[samples, length, width]`; see `commit`."""
        streams, sent = self._sent(streams)
        if sent is not None:
            return sent
        inputs, own = self._written(0, streams)
        self.journal.commit_inputs(inputs)
        return own

    def commit(self, block: BlockContent, streams: Mapping[str, Iterable[Tensor]]) -> dict[str, Sequence[Tensor]]:
        """Store a finished block and the inputs of the next one.

        The block's file is written first, then that of the activations; then both are named in the journal.

        Args:
            block: The block's tensors and records.
            streams: This rank's activations by name, in batches `[samples, length, width]`, computed while they are written.

        Returns:
            This rank's activations, in memory or from the file.

        Raises:
            OSError: The disk refuses; the journal is then as before.
        """
        streams, sent = self._sent(streams)
        if sent is not None:
            return sent
        finished = self.journal.write_block(block)
        inputs, own = self._written(len(self.journal.blocks) + 1, streams)
        self.journal.commit(finished, inputs)
        return own

    def resume(self, batch: int) -> dict[str, Sequence[Tensor]]:
        """This rank's inputs of the next block, `batch` samples at a time, in memory or from a file."""
        path = self.journal.inputs
        assert path is not None
        names = self.group.broadcast(lambda: list(map_file(path).tensors))
        if not self.group.first:
            return {name: self.hold(name, self.group.receive(0)) for name in names}
        for rank in range(1, self.group.size):
            self._send(rank, self.store.read(path, batch, self._share(rank)))
        return self.store.load(path, batch, self._share(0))

    def hold(self, name: str, batches: Iterable[Tensor]) -> Sequence[Tensor]:
        """Hold this rank's activations, in batches `[samples, length, width]`, until they are dropped."""
        return self.store.hold(name, batches, self.own_count)

    def gather(self, name: str, batches: Sequence[Tensor], batch: int) -> Sequence[Tensor]:
        """Gather the activations of all ranks on the first one.

        Args:
            name: A name for the activations.
            batches: This rank's activations, `[samples, length, width]` per batch.
            batch: Samples in each batch of the result.

        Returns:
            All activations on the first rank, none on the others.
        """
        if self.group.size == 1:
            return batches
        if not self.group.first:
            self.group.send(0, batches)
            return []
        others = (self.group.receive(rank) for rank in range(1, self.group.size))
        return self.store.hold(name, _rebatched(chain(batches, *others), batch), sum(self.shares))

    def _share(self, rank: int) -> slice:
        begin = sum(self.shares[:rank])
        return slice(begin, begin + self.shares[rank])

    def _sent(
        self, streams: Mapping[str, Iterable[Tensor]]
    ) -> tuple[Mapping[str, Iterable[Tensor]], dict[str, Sequence[Tensor]] | None]:
        """The activations to be written, and those that this rank has sent to the first rank instead.

        Each of several ranks computes all of its activations before it waits for another.
        """
        if self.group.size == 1:
            return streams, None
        own = {name: self.hold(name, stream) for name, stream in streams.items()}
        if self.group.first:
            return own, None
        self._send(0, own)
        return own, own

    def _send(self, to: int, streams: Mapping[str, Sequence[Tensor]]) -> None:
        for batches in streams.values():
            self.group.send(to, batches)

    def _written(self, blocks: int, streams: Mapping[str, Iterable[Tensor]]) -> tuple[StoredFile, dict[str, Sequence[Tensor]]]:
        """Write the activations of all ranks after so many blocks; gives their file, and this rank's activations."""
        path = self.journal.inputs_path(blocks)
        checksum, own = self.store.write(path, streams, self.shares, self._received)
        return StoredFile(path.name, checksum), own

    def _received(self) -> Iterator[Tensor]:
        for rank in range(1, self.group.size):
            yield from self.group.receive(rank)


def _rebatched(pieces: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """The same samples in batches of `batch`; the last may be smaller."""
    rest: Tensor | None = None
    for piece in pieces:
        rest = piece if rest is None or not len(rest) else torch.cat([rest, piece])
        while len(rest) >= batch:
            yield rest[:batch]
            rest = rest[batch:]
    if rest is not None and len(rest):
        yield rest
