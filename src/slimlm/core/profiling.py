"""Named sections of a compression, which a profiler can time; without a profiler a section costs one look-up of a variable.

    with profiling(clock):
        slimlm.compress(...)

A function that should have a line of its own in a profile is marked with `@profiled("sweep")`. Inside `profiling`, in the same
thread, the profiler is notified before and after each of its calls. benchmarks/compression.py has such a profiler.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Call:
    """One call of a profiled function."""

    section: str
    """the section's name; several functions may share one"""
    function: str
    """the function's own name"""
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Profiler(Protocol):
    """Is notified of profiled calls; those that have begun and not ended yet form a stack."""

    def begin(self, call: Call) -> None:
        """A call begins, inside those that have not ended."""

    def end(self) -> None:
        """The call that began last ends, by returning or by raising."""


_PROFILER: ContextVar[Profiler | None] = ContextVar("profiler", default=None)
_PROFILED: set[tuple[str, str]] = set()


def profiled_functions() -> frozenset[tuple[str, str]]:
    """Section and function name of every profiled function in the modules that are imported."""
    return frozenset(_PROFILED)


@contextmanager
def profiling(profiler: Profiler) -> Iterator[None]:
    """Within this context a profiler is notified of the profiled calls of this thread."""
    token = _PROFILER.set(profiler)
    try:
        yield
    finally:
        _PROFILER.reset(token)


def profiled(section: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function, a method or (under `@classmethod`) a class method as belonging to this section."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        _PROFILED.add((section, function.__name__))

        @functools.wraps(function)
        def announced(*args: P.args, **kwargs: P.kwargs) -> R:
            profiler = _PROFILER.get()
            if profiler is None:
                return function(*args, **kwargs)
            profiler.begin(Call(section, function.__name__, args, kwargs))
            try:
                return function(*args, **kwargs)
            finally:
                profiler.end()

        return announced

    return mark
