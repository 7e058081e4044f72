"""`slimlm with`."""

import os
import sys
from typing import Annotated

import typer


def with_program(
    context: typer.Context,
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="A Python program, such as lm_eval, or a .py file.")],
) -> None:
    """Run another Python program so that transformers opens compressed folders in it: slimlm with lm_eval ...

    All that follows PROGRAM is its own. Programs open a compressed folder only after `import slimlm`, which this does first.
    """
    # The program replaces this process, so that signals, errors and exit code are its own.
    # -P: a console script finds no modules in the current folder.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "slimlm.cli.program", program, *context.args])
