"""Too few files or too little memory: a message, no traceback, and more of it is all that the same command needs."""

import signal

import pytest

from tests.faults.conftest import Bench
from tests.faults.harness import Ended, Limits, kept


def raised(bench: Bench, limits: list[Limits]) -> int:
    """Give the same command under limits that are raised until it comes to its end; gives how often it was refused."""
    for number, limit in enumerate(limits):
        before = kept(bench.journal)
        ended = bench.run("matched", None, limit)
        if ended.code == 0:
            bench.same()
            return number
        ended.refused()
        assert len(kept(bench.journal)) >= len(before)
    bench.goes_on()
    return len(limits)


def test_too_few_files(bench: Bench) -> None:
    assert raised(bench, [Limits(files=number) for number in (0, 2, 8, 30, 100)]) == 4


def test_too_few_files_at_first(bench: Bench) -> None:
    """What the system would allow is asked for."""
    bench.run("matched", None, Limits(files=8, more_files=True)).done()
    bench.same()


@pytest.mark.slow
def test_ever_more_files(bench: Bench) -> None:
    """Some twenty starts."""
    assert raised(bench, [Limits(files=number) for number in range(0, 100, 5)]) >= 6


@pytest.mark.parametrize(
    "where", ["run.block:measure", "pipeline:reconstruct_block", "run.assemble:compress_embeddings", "pipeline:verify_written"]
)
def test_memory_that_runs_out_on_the_way(where: str, bench: Bench) -> None:
    ended = bench.run("matched", None, Limits(memory=0, since=f"slimlm.{where}"))
    in_words_or_killed(ended)
    bench.goes_on()


def in_words_or_killed(ended: Ended) -> None:
    """Check that a run without memory ended with a message; native libraries may end the process where they find none."""
    # 127: the dynamic loader, which has no room for a library's thread-local data.
    if ended.code not in (-signal.SIGSEGV, -signal.SIGABRT, 127):
        ended.refused()


@pytest.mark.slow
def test_ever_more_memory(bench: Bench) -> None:
    """Some twenty starts."""
    for mebibytes in range(0, 120, 2):
        ended = bench.run("matched", None, Limits(memory=mebibytes << 20))
        if ended.code == 0:
            break
        in_words_or_killed(ended)
    assert mebibytes >= 8
    bench.same()
