"""What all verbs have in common: errors that name flags, and the exit codes of a run that is stopped."""

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import typer
from typer.core import TyperCommand

from slimlm.core.errors import SlimlmError

STOPPED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes after Ctrl-C and after SIGTERM, as shells give them."""

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
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as schedulers and `kill` send it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into exit codes, after the run has notified the user of what is kept."""

    def terminate(number: int, frame: object) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _TerminatedError:
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        raise typer.Exit(STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
