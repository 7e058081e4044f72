"""Run another Python program with slimlm imported: `slimlm with` starts `python -P -m slimlm.cli.program PROGRAM [ARGUMENTS]`.

Processes that the program forks have slimlm imported, too. Those that multiprocessing starts afresh ("spawn") import the main
module of the program: this one where it is a console script, but its own where it is a .py file or a module, which must then
import slimlm.
"""

import os
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
        _look_for_modules_in(Path.cwd())
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = [program, *arguments]
    if program.endswith(".py") and Path(program).is_file():
        _look_for_modules_in(Path(program).resolve().parent)
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


def _look_for_modules_in(folder: Path) -> None:
    """Put the folder of a program's own modules first, as Python itself does without the option -P."""
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, str(folder))


if __name__ == "__main__":
    main()
