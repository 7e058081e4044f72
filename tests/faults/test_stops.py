"""Ctrl-C and SIGTERM: the run says what it keeps, ends with 130 or 143, and resumes when the same command is given again."""

import random
import signal

import pytest

from tests.faults.conftest import Bench
from tests.faults.harness import Ended, Moment, kept

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
MOMENTS = {
    "in a block": Moment(("slimlm.run.block:measure",), 2),
    "while the journal is written": Moment(("os:fsync",), 8),
    "while the checkpoint is written": Moment(("slimlm.storage.checkpoint:write_config",), 2),
}


def in_words(ended: Ended, bench: Bench, number: int) -> None:
    """Check that a run was stopped by this signal, and said so."""
    assert ended.code == STATUS[signal.Signals(number)], ended
    assert "Traceback" not in ended.said, ended.said
    assert "note: stopped: " in ended.said, ended.said
    if blocks := len(kept(bench.journal)):
        assert f"{blocks} finished blocks are kept in {bench.journal}; the same call resumes from there" in ended.said
    else:
        assert "nothing is kept" in ended.said and not bench.journal.exists()


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_stopped(moment: str, number: int, bench: Bench) -> None:
    where = MOMENTS[moment]
    in_words(bench.run("matched", Moment(where.where, where.number, signal=number)), bench, number)
    bench.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
def test_a_run_stopped_at_random_moments(number: int, bench: Bench) -> None:
    """Twenty starts."""
    drawn, whole = random.Random(number), bench.undisturbed().seconds
    for _ in range(20):
        run = bench.start()
        # What the command line does before it reads its arguments is Python's own affair.
        run.send_after(0.3 + drawn.uniform(0, whole), number)
        ended = run.ended()
        if bench.out.exists():
            break
        if ended.said == "slimlm: stopped":
            # It was importing its libraries, and the run had not begun.
            assert ended.code == STATUS[signal.Signals(number)] and not bench.journal.exists()
        else:
            in_words(ended, bench, number)
    else:
        bench.run().done()
    bench.same()
