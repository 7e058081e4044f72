"""What all verbs have in common: errors that name flags, and the exit codes of a run that is stopped."""

import os
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import typer
from typer.core import TyperCommand

from slimlm.cli import STOPPED, say_stopped
from slimlm.core.errors import SlimlmError

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, as shells give it."""

_HERE = str(Path(__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])
_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*))?`")


class Parameter(Protocol):
    """The attributes of typer's parameters that are used here."""

    @property
    def name(self) -> str | None: ...
    @property
    def opts(self) -> list[str]: ...
    @property
    def param_type_name(self) -> str: ...


class Verb(TyperCommand):
    """A verb of the command line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; an error names its flags, and a run that is stopped ends with its exit code and no traceback."""
        try:
            with _stoppable():
                return super().invoke(ctx)
        except SlimlmError as error:
            error.args = (in_flags(str(error), self.params), *error.args[1:])
            raise


def in_flags(text: str, parameters: Sequence[Parameter]) -> str:
    """A message of the library with the flags of a verb in place of the arguments that it names in backticks.

    `samples` becomes --samples, `restart=True` --restart, `device="cpu"` --device cpu, and a positional `model` MODEL; names
    that are not parameters of the verb do not change.
    """
    flags = {parameter.name: _flag(parameter) for parameter in parameters}

    def flag(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in flags:
            return found[0]
        return flags[name] if value in (None, "True") else f"{flags[name]} {_unquoted(value)}"

    return _ARGUMENT.sub(flag, text)


def _flag(parameter: Parameter) -> str:
    """The long flag of an option, or the name that a positional argument has in --help."""
    if parameter.param_type_name == "argument":
        return str(getattr(parameter, "metavar", None) or parameter.name).upper()
    return max(parameter.opts, key=len)


def _unquoted(value: str) -> str:
    """A text as a shell takes it, without its Python quotes; other values as they are."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return shlex.quote(value[1:-1]) if quoted else value


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as schedulers and `kill` send it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into exit codes, after the run has notified the user of what is kept."""
    codes: dict[int, int] = {signal.SIGINT: STOPPED, signal.SIGTERM: TERMINATED}

    def stop(number: int, frame: FrameType | None) -> None:
        if _only_imports(frame):
            # No work has begun, and torch may swallow an exception that is raised while it is imported.
            say_stopped()
            os._exit(codes[number])
        raise _TerminatedError if number == signal.SIGTERM else KeyboardInterrupt

    # A signal that the parent ignores (nohup, a job in a script's background) stays ignored.
    heeded = [number for number in codes if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    except _TerminatedError:
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        raise typer.Exit(STOPPED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _only_imports(frame: FrameType | None) -> bool:
    """Whether the verb is importing what it needs: no function of slimlm outside this package is running."""
    importing = False
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_PACKAGE) and not file.startswith(_HERE) and name != "<module>":
            return False
        importing |= file.startswith("<frozen importlib")
        frame = frame.f_back
    return importing
