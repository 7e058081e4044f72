"""The processes ("ranks") that share a run, and the collective operations between them.

Code that is given a `Group` reads the same for one process and for many: `Group` itself is a single process, for which every
operation is the identity. `Ranks` uses torch.distributed. Plain data are sent as JSON and tensors as their bytes; nothing is
pickled. Sums are added in the order of the ranks, in the dtype they come in, so that the same ranks give the same bits.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from slimlm.distributed.liveness import Watch

_ELEMENTS_AT_ONCE = 2**23
"""Elements that are summed at a time: a covariance of a wide layer is not held once more for every rank."""
_TIMEOUT = timedelta(days=30)
"""A rank may compute for hours before it answers. `Watch` finds out whether it is alive; a timeout does not."""
_LONGEST_PAUSE = 0.02
"""The longest pause, in seconds, between two checks whether an operation is complete."""


class Group:
    """A single process."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """The number of ranks on this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and reports to the user."""
        return self.rank == 0

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """The result of `make` on the first rank, on every rank; other ranks do not call it. It is plain data for JSON."""
        return make()

    def broadcast_tensor(self, make: Callable[[], Tensor]) -> Tensor:
        """As `broadcast`, for a tensor `[...]` on the CPU."""
        return make()

    def broadcast_from(self, owner: int, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Broadcast plain data and tensors of one rank.

        Args:
            owner: The rank whose data are sent; those of other ranks are ignored.
            value: Plain data for JSON.
            tensors: Tensors `[...]` by name.

        Returns:
            The owner's data and tensors, on the CPU on other ranks.
        """
        return value, tensors

    def all_gather(self, value: Any) -> list[Any]:
        """Plain data of every rank, in their order, on every rank."""
        return [value]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in their order, of a tensor `[...]`, which may be changed."""
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over the ranks of a tensor `[...]`, which may be changed."""
        return tensor

    def send(self, to: int, tensors: Iterable[Tensor]) -> None:
        """Send tensors `[...]` to another rank, which must `receive` them; one of the two must be the first rank."""
        raise NotImplementedError("a single process sends nothing")

    def receive(self, source: int) -> Iterator[Tensor]:
        """The tensors that another rank sends, one at a time, on the CPU."""
        raise NotImplementedError("a single process receives nothing")


ALONE = Group()
"""The group of a run that has one process."""


class Ranks(Group):
    """Processes connected by torch.distributed. Every operation raises RanksError where another rank has ended."""

    def __init__(self, watch: Watch, store: Store, backend: str, local_size: int) -> None:
        """Connect; every rank must call this at the same time. `store` is used by torch.distributed alone."""
        self.rank, self.size, self.local_size = watch.rank, watch.size, local_size
        self.watch = watch
        with watch.explaining_failures():
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_TIMEOUT)
            # Each pair of ranks is a group, because a plain send does not report whether it is complete.
            pairs = [dist.new_group([0, other], timeout=_TIMEOUT, backend="gloo") for other in range(1, self.size)]
        self._pairs = dict(enumerate(pairs, 1))

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """See `Group.broadcast`."""
        made = make() if self.first else None
        received = self.broadcast_from(0, made, {})[0]
        return made if self.first else received

    def broadcast_tensor(self, make: Callable[[], Tensor]) -> Tensor:
        """See `Group.broadcast_tensor`; the tensor is `[...]`."""
        return self.broadcast_from(0, None, {"": make()} if self.first else {})[1][""]

    def broadcast_from(self, owner: int, value: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """See `Group.broadcast_from`; tensors are `[...]`."""
        return self._broadcast(owner, value, tensors, None)

    def all_gather(self, value: Any) -> list[Any]:
        """See `Group.all_gather`."""
        data = _bytes_of(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._wait(dist.all_gather(found, padded, async_op=True))
        return [_value_of(each[:length]) for each, length in zip(found, lengths, strict=True)]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """See `Group.all_reduce_sum`; the tensor is `[...]`."""
        for piece in tensor.view(-1).split(_ELEMENTS_AT_ONCE):
            # Each rank sums one stripe and sends the sum to all.
            stripe = -(-len(piece) // self.size)
            mine = piece.new_zeros(self.size * stripe)
            mine[: len(piece)] = piece
            theirs = torch.empty_like(mine)
            self._wait(dist.all_to_all_single(theirs, mine, async_op=True))
            first, *others = theirs.split(stripe)
            for other in others:
                first += other
            self._wait(dist.all_gather(list(mine.split(stripe)), first, async_op=True))
            piece.copy_(mine[: len(piece)])
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """See `Group.all_reduce_max`; the tensor is `[...]`."""
        self._wait(dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True))
        return tensor

    def send(self, to: int, tensors: Iterable[Tensor]) -> None:
        """See `Group.send`; tensors are `[...]`."""
        pair = self._pairs[max(to, self.rank)]
        for tensor in tensors:
            self._broadcast(self.rank, True, {"": tensor}, pair)
        self._broadcast(self.rank, False, {}, pair)

    def receive(self, source: int) -> Iterator[Tensor]:
        """See `Group.receive`."""
        pair = self._pairs[max(source, self.rank)]
        while True:
            more, tensors = self._broadcast(source, None, {}, pair)
            if not more:
                return
            yield tensors[""]

    def disconnect(self) -> None:
        """Close the connections of torch.distributed."""
        dist.destroy_process_group()

    def _broadcast(
        self, owner: int, value: Any, tensors: dict[str, Tensor], among: dist.ProcessGroup | None
    ) -> tuple[Any, dict[str, Tensor]]:
        """The data and tensors of the rank `owner`, on every rank of a process group (None: all ranks)."""
        mine = self.rank == owner
        layout: dict[str, Any] = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
        head = _bytes_of([value, layout]) if mine else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(head)])
        self._wait(dist.broadcast(size, owner, group=among, async_op=True))
        if not mine:
            head = torch.empty(int(size), dtype=torch.uint8)
        self._wait(dist.broadcast(head, owner, group=among, async_op=True))
        if not mine:
            value, layout = _value_of(head)
        found = {}
        for name, (dtype, shape) in layout.items():
            if mine:
                flat = tensors[name].detach().cpu().contiguous().view(-1)
            else:
                flat = torch.empty(prod(shape), dtype=getattr(torch, dtype))
                found[name] = flat.view(shape)
            if len(flat):
                self._wait(dist.broadcast(flat.view(torch.uint8), owner, group=among, async_op=True))
        return value, tensors if mine else found

    def _wait(self, work: Any) -> None:
        pause = 5e-5
        while not work.is_completed():
            self.watch.check()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        with self.watch.explaining_failures():
            work.wait()


def assign(costs: dict[str, float], ranks: int) -> dict[str, int]:
    """Assign jobs to ranks: in order of decreasing cost, each to the rank with the least total cost, the lowest of several."""
    loads = [0.0] * ranks
    found = {}
    for name, cost in sorted(costs.items(), key=lambda job: -job[1]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += cost
    return found


def _bytes_of(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value_of(data: Tensor) -> Any:
    return json.loads(bytes(data.numpy()))
