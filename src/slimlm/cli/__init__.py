"""The command line: one file per verb. Nothing here imports torch or transformers before a verb runs."""

import sys

REFUSED = 2
"""Exit code after an error that slimlm explains; typer's own for a command line that makes no sense."""
STOPPED = 130
"""Exit code after Ctrl-C, as shells give it."""


def main() -> None:
    """Entry point. Ctrl-C before the command line is imported ends with one line, as it does later."""
    try:
        from slimlm.cli.app import main as run
    except KeyboardInterrupt:
        say_stopped()
        sys.exit(STOPPED)
    run()


def say_stopped() -> None:
    """Print that the command was stopped to standard error."""
    sys.stderr.write("slimlm: stopped\n")
    sys.stderr.flush()
