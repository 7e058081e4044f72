"""CUDA streams and graphs of two fake GPUs, as far as a capture needs them: which GPU computes what, and what is replayed.

A GPU's kernels are the calls themselves, run on the CPU. Inside a capture a call whose tensors are on the capturing stream's
GPU is recorded in the graph; one whose tensors are on another GPU runs at once, and the graph stays empty.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """A stream of one GPU."""

    device: torch.device

    def wait_stream(self, other: "Stream") -> None:
        """Streams of two GPUs have no need to wait for each other here."""
        assert self.device == other.device


class Graph:
    """What was captured, replayed in place."""

    def __init__(self) -> None:
        self.replays: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Run what was captured again."""
        for own in self.replays:
            own()


@dataclass
class FakeCuda:
    """Two GPUs, the first of which is the current one."""

    current: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    capturing: tuple[Graph, Stream] | None = None
    used: list[torch.device] = field(default_factory=list)
    """the GPUs that were current whenever a graph was captured"""

    @contextmanager
    def device(self, wanted: Any) -> Iterator[None]:
        """As torch.cuda.device."""
        before, self.current = self.current, torch.device(wanted)
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Graph, stream: Stream | None = None) -> Iterator[None]:
        """As torch.cuda.graph: without a stream, one of the current GPU."""
        self.used.append(self.current)
        self.capturing = graph, stream or Stream(self.current)
        try:
            yield
        finally:
            self.capturing = None

    def on(self, where: torch.device, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A call whose tensors are on this GPU."""

        def launched() -> Tensor:
            made = call()
            if self.capturing is not None and self.capturing[1].device == where:
                self.capturing[0].replays.append(lambda: made.copy_(call()) and None)
            return made

        return launched


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Replace what torch.cuda offers by two fake GPUs."""
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(torch.device(device or cuda.current)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(torch.device(device or cuda.current)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return cuda
