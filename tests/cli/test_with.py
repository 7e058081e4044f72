"""`slimlm with`: another program opens compressed folders, and all else is its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from slimlm.cli.app import _without_debug

OPEN = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__, sys.argv[2:])
"""


SPAWN = """
import multiprocessing, sys
def imported():
    return "slimlm" in sys.modules
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(imported))
"""


def started(*arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    # -P, as for the console script `slimlm`.
    command = [sys.executable, "-P", "-m", "slimlm", "with", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(OPEN)
    return path


def test_a_program_that_does_not_import_slimlm_opens_a_checkpoint(packed: Path, program: Path) -> None:
    # Without `slimlm with`: test_refusals.py.
    done = started(program, packed, "--debug", "--help")
    assert (done.returncode, done.stdout) == (0, "LlamaForCausalLM ['--debug', '--help']\n"), done.stderr


@pytest.mark.parametrize(
    ("typed", "arguments", "debug"),
    [
        ("inspect with --debug", "inspect with", True),
        ("--debug with p --debug", "with p --debug", True),
        ("with p --debug", "with p --debug", False),
        ("--debug --debug", "", True),
    ],
)
def test_debug_belongs_to_the_program_after_the_verb_with_alone(typed: str, arguments: str, debug: bool) -> None:
    assert _without_debug(typed.split()) == (arguments.split(), debug)


def test_console_scripts_and_modules_run_with_their_own_exit_codes(tmp_path: Path) -> None:
    assert started("slimlm", "--version").stdout.startswith("slimlm ")
    assert started("slimlm", "--nonsense").returncode == 2
    assert started("-m", "timeit", "-n", "1", "-r", "1", "pass").returncode == 0
    (tmp_path / "fails.py").write_text("raise OSError('mine')")
    failed = started(tmp_path / "fails.py")
    assert failed.returncode == 1 and "Traceback" in failed.stderr and "OSError: mine" in failed.stderr


def test_a_program_that_is_not_installed_is_named_with_a_similar_one() -> None:
    done = started("slimlmm")
    assert done.returncode == 2 and "no Python program named slimlmm" in done.stderr and "did you mean slimlm?" in done.stderr


def test_modules_of_the_current_folder_are_found_where_python_itself_finds_them(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ImportError('a local module')")
    assert started("slimlm", "--version", cwd=tmp_path).returncode == 0
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, value in (("mine", "outer"), ("inner/mine", "inner")):
        (tmp_path / f"{name}.py").write_text(f"name = {value!r}")
    for path in (tmp_path / "shows.py", inner / "shows.py"):
        path.write_text("import sys, mine; print(mine.name, sys.path[0])")
    for arguments in (["-m", "shows"], ["shows.py"], ["inner/shows.py"]):
        bare = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert started(*arguments, cwd=tmp_path).stdout == bare.stdout != ""


def test_a_spawned_process_of_a_file_imports_slimlm_where_the_file_does(tmp_path: Path) -> None:
    """As the README says, and no more."""
    (tmp_path / "without.py").write_text(SPAWN)
    (tmp_path / "imports.py").write_text("import slimlm\n" + SPAWN)
    assert started("without.py", cwd=tmp_path).stdout == "False\n"
    assert started("imports.py", cwd=tmp_path).stdout == "True\n"
