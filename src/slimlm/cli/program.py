"""Run another Python program with slimlm imported: `slimlm with` starts `python -m slimlm.cli.program PROGRAM [ARGUMENTS]`.

A process that is started with this module as its main one (multiprocessing's "spawn") imports slimlm, too.
"""

import runpy
import sys
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path

import slimlm  # noqa: F401  (transformers opens compressed folders from here on)
from slimlm.cli import REFUSED


def main() -> None:
    """Run the program that the command line names: a console script, a .py file, or `-m` and a module."""
    program, *arguments = sys.argv[1:]
    if program == "-m" and arguments:
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = [program, *arguments]
    if program.endswith(".py") and Path(program).is_file():
        # As Python does for a file: its folder is where its own modules are found.
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
        return
    scripts = {script.name: script for script in entry_points(group="console_scripts")}
    if program not in scripts:
        near = get_close_matches(program, scripts, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.stderr.write(
            f"slimlm: no Python program named {program} is installed in this environment ({sys.prefix}). {hint}"
            "Give the name of a program such as lm_eval, a .py file, or -m and a module\n"
        )
        sys.exit(REFUSED)
    sys.exit(scripts[program].load()())


if __name__ == "__main__":
    main()
