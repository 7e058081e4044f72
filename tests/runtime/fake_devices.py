"""CUDA streams and graphs that are pretended, as far as a capture needs them: what goes to which card, and what is replayed.

A card's kernels are the calls themselves, run on the CPU. Inside a capture a call whose tensors lie on the capturing stream's
card is kept for the graph and leaves its result unmade, as a card would; one on another card runs at once, and the graph
stays empty.
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
    """A stream of one card."""

    device: torch.device

    def wait_stream(self, other: "Stream") -> None:
        """Streams of two cards have no need to wait for each other here."""
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
class Cards:
    """Two cards, the first of which is the current one."""

    current: torch.device = field(default_factory=lambda: torch.device("cuda", 0))
    capturing: tuple[Graph, Stream] | None = None
    used: list[torch.device] = field(default_factory=list)
    """the cards that were current whenever a graph was captured"""

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
        """As torch.cuda.graph: without a stream, one of the current card."""
        self.used.append(self.current)
        self.capturing = graph, stream or Stream(self.current)
        try:
            yield
        finally:
            self.capturing = None

    def on(self, where: torch.device, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A call whose tensors lie on this card."""

        def launched() -> Tensor:
            made = call()
            if self.capturing is not None and self.capturing[1].device == where:
                self.capturing[0].replays.append(lambda: made.copy_(call()) and None)
            return made

        return launched


def pretend_cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    """Let torch.cuda be two such cards."""
    cards = Cards()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(torch.device(device or cards.current)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(torch.device(device or cards.current)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", cards.graph)
    monkeypatch.setattr(torch.cuda, "device", cards.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return cards
