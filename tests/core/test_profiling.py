"""Profiled sections: announced in order to whom profiles, to nobody else, and without changing what a function is or gives."""

import inspect
import threading

import pytest

from slimlm.core.profiling import Call, profiled, profiled_functions, profiling


class Log:
    """Writes down what begins and ends."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, call: Call) -> None:
        self.lines.append(f"{call.section}: {call.function}{call.arguments}{call.keywords}")

    def end(self) -> None:
        self.lines.append("end")


@profiled("inner")
def half(number: int, *, up: bool = False) -> int:
    """Half of it."""
    if number < 0:
        raise ValueError("negative")
    return (number + up) // 2


@profiled("outer")
def quarter(number: int) -> int:
    return half(half(number, up=True))


class Box:
    @classmethod
    @profiled("made")
    def of(cls, number: int) -> "Box":
        return cls()


def test_calls_are_announced_inside_one_another_with_their_arguments() -> None:
    log = Log()
    with profiling(log):
        assert quarter(7) == 2
    assert log.lines == ["outer: quarter(7,){}", "inner: half(7,){'up': True}", "end", "inner: half(4,){}", "end", "end"]


def test_a_call_that_raises_ends_too() -> None:
    log = Log()
    with profiling(log), pytest.raises(ValueError, match="negative"):
        quarter(-8)
    assert log.lines.count("end") == 2


def test_outside_and_in_other_threads_nothing_is_announced() -> None:
    log = Log()
    with profiling(log):
        other = threading.Thread(target=quarter, args=(7,))
        other.start()
        other.join()
    assert quarter(7) == 2
    assert log.lines == []


def test_class_methods_are_announced_with_their_class() -> None:
    log = Log()
    with profiling(log):
        assert isinstance(Box.of(3), Box)
    assert log.lines[0].startswith("made: of(<class") and log.lines[1:] == ["end"]


def test_a_profiled_function_keeps_its_name_signature_and_docstring() -> None:
    assert (half.__name__, half.__doc__) == ("half", "Half of it.")
    assert list(inspect.signature(half).parameters) == ["number", "up"]


def test_every_profiled_function_is_listed() -> None:
    assert {("inner", "half"), ("outer", "quarter"), ("made", "of")} <= profiled_functions()
