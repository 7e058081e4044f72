"""The command line's verbs, its entry point and its exit codes. Progress goes to standard error, results to standard output."""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Annotated

import typer

from slimlm.cli import REFUSED, STOPPED, say_stopped
from slimlm.cli.bench import bench
from slimlm.cli.compress import compress
from slimlm.cli.demo import demo
from slimlm.cli.doctor import doctor
from slimlm.cli.evaluate import evaluate
from slimlm.cli.generate import generate
from slimlm.cli.inspect import inspect
from slimlm.cli.methods import methods
from slimlm.cli.plan import plan
from slimlm.cli.recipes import recipes
from slimlm.cli.tune import tune
from slimlm.cli.verb import TERMINATED, Verb
from slimlm.cli.verify import verify
from slimlm.cli.with_program import with_program
from slimlm.core.errors import SlimlmError, first_line, is_out_of_memory
from slimlm.distributed.environment import global_rank, reports, world_size

VERBS = (
    ("compress", compress),
    ("plan", plan),
    ("tune", tune),
    ("eval", evaluate),
    ("generate", generate),
    ("bench", bench),
    ("inspect", inspect),
    ("verify", verify),
    ("methods", methods),
    ("recipes", recipes),
    ("demo", demo),
    ("doctor", doctor),
)

UNREAD = 1
"""Exit code where the reader of standard output closed it."""

app = typer.Typer(
    name="slimlm",
    help="Make language models smaller without retraining them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name, _function in VERBS:
    app.command(_name, cls=Verb)(_function)
WITH = "with"
app.command(
    WITH,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(with_program)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slimlm {version('slimlm')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Make language models smaller without retraining them."""
    # `main` takes --debug off the line before typer sees it; it is declared here for --help.
    if world_size() > 1 and context.invoked_subcommand not in ("compress", WITH):
        raise SlimlmError(
            f"{context.invoked_subcommand} is work for one process; only compress divides it among several (torchrun)"
        )


def main() -> None:
    """Entry point: an error of slimlm's is one message and exit code 2; `--debug`, anywhere on the line, adds the traceback."""
    arguments, debug = _without_debug(sys.argv[1:])
    _escape_what_cannot_be_shown()
    try:
        _refuse_undecodable(arguments)
        with _errors_of_transformers_alone():
            _run(arguments)
    except SlimlmError as error:
        _end(str(error) if reports(error) else None, debug=debug)
    except BrokenPipeError:
        _silence_output()
        sys.exit(UNREAD)
    except OSError as error:
        _silence_output()
        where = f" ({error.filename})" if error.filename else ", of standard output or of a file"
        _end(f"reading or writing failed{where}: {error.strerror or error}", debug=debug)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _end(f"memory ran out ({first_line(error)})", debug=debug)
    except ImportError as error:
        # Libraries are imported at their first use, where the loader may find no memory to map one.
        _end(f"a library cannot be imported: {error}; memory ran out, or the installation is incomplete", debug=debug)


def _without_debug(typed: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there; what follows `with PROGRAM` belongs to that program."""
    verb = next((place for place, word in enumerate(typed) if word != "--debug"), len(typed))
    own = verb if typed[verb : verb + 1] == [WITH] else len(typed)
    arguments = [a for a in typed[:own] if a != "--debug"]
    return [*arguments, *typed[own:]], len(arguments) < own


def _escape_what_cannot_be_shown() -> None:
    """Print a character that an output's encoding lacks as an escape; an error handler that PYTHONIOENCODING names stays."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _refuse_undecodable(arguments: list[str]) -> None:
    """Raise SlimlmError where an argument's bytes are no text, which tokenizers and JSON could not take."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise SlimlmError(
                f"{argument!a} holds bytes that are no {sys.getfilesystemencoding()} text (the first: "
                f"{argument[error.start]!a}); give text and file names in the terminal's encoding, or set LC_ALL=C.UTF-8"
            ) from None


@contextmanager
def _errors_of_transformers_alone() -> Iterator[None]:
    """Let transformers, if it is imported meanwhile, log errors and no warnings; a level that the user has set stays."""
    name = "TRANSFORMERS_VERBOSITY"
    if name in os.environ:
        yield
        return
    os.environ[name] = "error"
    try:
        yield
    finally:
        del os.environ[name]


def _run(arguments: list[str]) -> None:
    """Run a verb; ends in SystemExit once all output is written."""
    try:
        app(args=arguments)
    except SystemExit as ended:
        if ended.code in (STOPPED, TERMINATED) and global_rank() == 0:
            say_stopped()
        # An error in writing buffered output when Python ends would have no message of slimlm's.
        sys.stdout.flush()
        raise


def _end(message: str | None, *, debug: bool) -> None:
    """End with a message on standard error; with `debug` after the traceback of the error that is being handled."""
    if debug:
        traceback.print_exc()
    if message is not None:
        sys.stderr.write(f"slimlm: {message}\n")
    sys.exit(REFUSED)


def _silence_output() -> None:
    """Discard further standard output, which Python would otherwise try to write again when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
