"""Signs of life, and the words in which a run of many ranks ends.

Each rank counts on, twice a second, under a key of its own in the store that torch.distributed keeps for all. A rank whose
count stands still for `SILENCE` seconds is taken for dead, however long the others would have waited for it. A rank that ends
with an error leaves its words in the store first, so that the others can say why they end.
"""

import _thread
import json
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

from slimlm.core.errors import RanksError

SILENCE = 60.0
"""Seconds without a sign of life after which a rank is taken for dead."""
_BEAT = 0.5
_JOIN = timedelta(minutes=5)
"""How long ranks wait for one another at the beginning."""
_LOOK = 4.0
"""Seconds to find out who is missing, once something shows that somebody is."""
_NOTICE = 5.0
"""Seconds after which work that does not wait for others is interrupted because a rank has ended."""


class Watch:
    """One rank's view of who is alive. Its thread runs from `begin` to `end`."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._ended: RanksError | None = None
        self._stopped = False
        """whether a rank was stopped by its user"""
        self._hosts: list[str] = []
        self._seen: list[tuple[bytes, float]] = []
        """each rank's count, and when it was new"""
        self._over, self._noticed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="slimlm-watch", daemon=True)

    def begin(self) -> None:
        """Meet the other ranks; raises RanksError where one does not come."""
        self._store.set(f"host/{self.rank}", platform.node())
        self._store.set(self._key(self.rank), "0")
        for rank in range(self.size):
            try:
                self._store.wait([self._key(rank)], _JOIN)
            except RuntimeError as error:
                raise RanksError(
                    f"rank {rank} of {self.size} did not come within {_JOIN.seconds // 60} minutes; see what it says itself"
                ) from error
            self._hosts.append(self._store.get(f"host/{rank}").decode())
        self._seen = [(b"0", time.monotonic())] * self.size
        self._thread.start()

    def end(self) -> None:
        """Give no more signs."""
        self._over.set()
        self._thread.join(timeout=2 * _BEAT)

    def look(self) -> None:
        """Raise where the run has ended: RanksError with the reason, or KeyboardInterrupt where a rank was stopped."""
        if self._ended is None and not self._stopped:
            return
        self._noticed.set()
        if self._ended is None:
            raise KeyboardInterrupt
        raise self._ended

    def find_out(self) -> None:
        """As `look`, after a moment in which to learn who has ended; returns where nobody has."""
        self._noticed.set()
        until = time.monotonic() + _LOOK
        while time.monotonic() < until:
            self.look()
            time.sleep(0.1)
        missing = self._silent(_LOOK - 2 * _BEAT)
        if missing:
            self._ended = self._dead(missing)
        self.look()

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A failed connection in the words of whoever brought it down."""
        try:
            yield
        except RuntimeError as error:
            self.find_out()
            raise RanksError(f"the connection between the ranks failed: {error}", speaks=self.rank == 0) from error

    def record(self, words: str, *, stopped: bool = False) -> None:
        """Leave the words in which this rank ends, unless another has ended before."""
        said = json.dumps({"rank": self.rank, "words": words, "stopped": stopped})
        try:
            self._store.compare_set("end", "", said)
        except RuntimeError:
            # The store is gone, and with it whoever could have read this.
            return

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _run(self) -> None:
        store: Any = self._store.clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=SILENCE))
        count = 0
        while not self._over.wait(_BEAT):
            count += 1
            try:
                store.set(self._key(self.rank), str(count))
                beats = store.multi_get([self._key(rank) for rank in range(self.size)])
                end = json.loads(store.get("end")) if store.check(["end"]) else None
            except RuntimeError:
                if self._over.is_set():
                    return
                lost = RanksError("the machine that keeps the ranks together no longer answers", speaks=True)
                self._ended = self._ended or lost
                self._insist()
                return
            now = time.monotonic()
            self._seen = [before if beat == before[0] else (beat, now) for beat, before in zip(beats, self._seen, strict=True)]
            if self._ended is not None or self._stopped:
                continue
            if end is not None and end["rank"] != self.rank:
                if end["stopped"]:
                    self._stopped = True
                else:
                    self._ended = RanksError(f"{self._name(end['rank'])}: {end['words']}")
            elif missing := self._silent(SILENCE):
                self._ended = self._dead(missing)
            if self._ended is not None or self._stopped:
                threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        """Interrupt the main thread where it has not found out by itself."""
        if not self._noticed.wait(_NOTICE) and not self._over.is_set():
            _thread.interrupt_main()

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in enumerate(self._seen) if rank != self.rank and now - since > seconds]

    def _dead(self, missing: list[int]) -> RanksError:
        """The lowest rank that is alive speaks."""
        lowest = next(rank for rank in range(self.size) if rank not in missing)
        words = " and ".join(map(self._name, missing))
        verb = "gives" if len(missing) == 1 else "give"
        return RanksError(
            f"{words} {verb} no sign of life: killed, out of memory, or cut off from the network", speaks=self.rank == lowest
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.size} (on {self._hosts[rank]})"
