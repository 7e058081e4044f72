"""Heartbeats between the ranks, and the reason with which a run of many ranks ends.

Each rank increments a counter of its own, twice a second, in the store that torch.distributed shares between them. A rank whose
counter does not change for `SILENCE` seconds is assumed dead, however long the others would have waited for it. A rank that
ends with an error first writes its message to the store, so that the others can report why they end.
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
"""Seconds without a heartbeat after which a rank is assumed dead."""
_INTERVAL = 0.5
"""Seconds between two heartbeats."""
_JOIN = timedelta(minutes=5)
"""The time that ranks wait for one another at the beginning."""
_SEARCH = 4.0
"""Seconds to find out which rank is missing, once a connection has failed."""
_NOTICE = 5.0
"""Seconds after which work that does not wait for other ranks is interrupted because a rank has ended."""


class Watch:
    """One rank's view of which ranks are alive. Its thread runs from `start` to `stop`."""

    def __init__(self, store: Store, rank: int, size: int, *, silence: float = SILENCE) -> None:
        """Make the watch of one rank.

        Args:
            store: The store that all ranks share.
            rank: This rank's number.
            size: The number of ranks.
            silence: Seconds without a heartbeat after which a rank is assumed dead.
        """
        self.rank, self.size = rank, size
        self._store, self._silence = store, silence
        self._ended: RanksError | None = None
        self._stopped = False
        """Whether the user stopped a rank."""
        self._hosts: list[str] = []
        self._seen: list[tuple[bytes, float]] = []
        """Each rank's counter, and the time when it last changed."""
        self._over, self._noticed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="slimlm-watch", daemon=True)

    def start(self) -> None:
        """Wait for the other ranks and start the heartbeat; raises RanksError where a rank does not come."""
        self._store.set(f"host/{self.rank}", platform.node())
        self._store.set(self._key(self.rank), "0")
        for rank in range(self.size):
            try:
                self._store.wait([self._key(rank)], _JOIN)
            except RuntimeError as error:
                raise RanksError(
                    f"rank {rank} of {self.size} did not come within {_JOIN.seconds // 60} minutes; see its own output"
                ) from error
            self._hosts.append(self._store.get(f"host/{rank}").decode())
        self._seen = [(b"0", time.monotonic())] * self.size
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat."""
        self._over.set()
        self._thread.join(timeout=2 * _INTERVAL)

    def check(self) -> None:
        """Raise where the run has ended: RanksError with the reason, or KeyboardInterrupt where a rank was stopped."""
        if self._ended is None and not self._stopped:
            return
        self._noticed.set()
        if self._ended is None:
            raise KeyboardInterrupt
        raise self._ended

    def check_after_a_moment(self) -> None:
        """As `check`, after a few seconds in which to learn which rank has ended; returns where none has."""
        self._noticed.set()
        until = time.monotonic() + _SEARCH
        while time.monotonic() < until:
            self.check()
            time.sleep(0.1)
        missing = self._without_heartbeat(_SEARCH - 2 * _INTERVAL)
        if missing:
            self._ended = self._dead(missing)
        self.check()

    @contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """A context in which a failing connection raises the reason that the rank which ended has posted."""
        try:
            yield
        except RuntimeError as error:
            self.check_after_a_moment()
            raise RanksError(f"the connection between the ranks failed: {error}", reported_here=self.rank == 0) from error

    def post_reason(self, message: str, *, stopped: bool = False) -> None:
        """Post the message with which this rank ends, unless another rank has ended before."""
        reason = json.dumps({"rank": self.rank, "message": message, "stopped": stopped})
        try:
            self._store.compare_set("end", "", reason)
        except RuntimeError:
            # The store is gone, and with it every rank that could have read this.
            return

    def _key(self, rank: int) -> str:
        return f"heartbeat/{rank}"

    def _run(self) -> None:
        store: Any = self._store.clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=self._silence))
        count = 0
        while not self._over.wait(_INTERVAL):
            count += 1
            try:
                store.set(self._key(self.rank), str(count))
                beats = store.multi_get([self._key(rank) for rank in range(self.size)])
                end = json.loads(store.get("end")) if store.check(["end"]) else None
            except RuntimeError:
                if self._over.is_set():
                    return
                lost = RanksError("the machine that keeps the store of the ranks no longer answers", reported_here=True)
                self._ended = self._ended or lost
                self._interrupt()
                return
            now = time.monotonic()
            self._seen = [before if beat == before[0] else (beat, now) for beat, before in zip(beats, self._seen, strict=True)]
            if self._ended is not None or self._stopped:
                continue
            if end is not None and end["rank"] != self.rank:
                if end["stopped"]:
                    self._stopped = True
                else:
                    self._ended = RanksError(f"{self._name(end['rank'])}: {end['message']}")
            elif missing := self._without_heartbeat(self._silence):
                self._ended = self._dead(missing)
            if self._ended is not None or self._stopped:
                threading.Thread(target=self._interrupt, daemon=True).start()

    def _interrupt(self) -> None:
        """Interrupt the main thread where it has not noticed that the run has ended."""
        if not self._noticed.wait(_NOTICE) and not self._over.is_set():
            _thread.interrupt_main()

    def _without_heartbeat(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, since) in enumerate(self._seen) if rank != self.rank and now - since > seconds]

    def _dead(self, missing: list[int]) -> RanksError:
        """The error for ranks that are dead; the lowest rank that is alive reports it."""
        lowest = next(rank for rank in range(self.size) if rank not in missing)
        names = " and ".join(map(self._name, missing))
        verb = "sends" if len(missing) == 1 else "send"
        return RanksError(
            f"{names} {verb} no heartbeat any more: killed, out of memory, or cut off from the network",
            reported_here=self.rank == lowest,
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.size} (on {self._hosts[rank]})"
