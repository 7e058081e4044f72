"""Too few files or too little memory: words, no traceback, and more of it is all that the same line needs."""

import pytest

from .conftest import Bench
from .harness import Limits, kept


def raised(bench: Bench, limits: list[Limits]) -> int:
    """Type the same line under limits that are raised until it comes to its end; gives how often it was refused."""
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
    assert raised(bench, [Limits(files=number) for number in (0, 2, 4, 8, 12)]) >= 3


@pytest.mark.slow
def test_ever_more_files(bench: Bench) -> None:
    """Some twenty starts."""
    assert raised(bench, [Limits(files=number) for number in range(60)]) >= 6


def test_too_little_memory(bench: Bench) -> None:
    assert raised(bench, [Limits(memory=mebibytes << 20) for mebibytes in (1, 8, 32)]) >= 1


@pytest.mark.slow
def test_ever_more_memory(bench: Bench) -> None:
    """Some thirty starts."""
    assert raised(bench, [Limits(memory=mebibytes << 20) for mebibytes in range(0, 120, 2)]) >= 4
