"""The command line answers at once: torch and transformers are imported when a verb runs, and not before."""

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import slimlm
from slimlm.cli.app import VERBS

HEAVY = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub")
SECONDS = 1.0
"""In which an answer is there; a tenth of it is what it takes, and torch alone takes longer."""

LOADED = """
import json, sys
sys.argv = ["slimlm", *sys.argv[1:]]
from slimlm.cli import main
try:
    main()
finally:
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


@pytest.mark.parametrize("typed", [("--version",), ("--help",), *((verb, "--help") for verb, _ in VERBS)])
def test_nothing_heavy_is_imported_for_help(typed: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *typed], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert "typer" in loaded and not set(HEAVY) & set(loaded)
    assert "slimlm" in done.stdout


@pytest.mark.parametrize("typed", ["--version", "--help"])
def test_the_answer_is_there_within_a_second(typed: str) -> None:
    def seconds() -> float:
        begun = os.times()
        subprocess.run([sys.executable, "-m", "slimlm", typed], capture_output=True, check=True)
        ended = os.times()
        return ended.children_user + ended.children_system - begun.children_user - begun.children_system

    # Of the processor, which other programs slow less than the clock; the best of three.
    assert min(seconds() for _ in range(3)) < SECONDS


def test_what_is_public_is_there_and_listed() -> None:
    assert set(slimlm.__all__) <= set(dir(slimlm))
    for name in slimlm.__all__:
        assert getattr(slimlm, name) is getattr(import_module(slimlm._HOMES.get(name, "slimlm.core.errors")), name)
    assert set(slimlm._HOMES) | {"SlimlmError"} == set(slimlm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        slimlm.compres  # type: ignore[attr-defined]  # noqa: B018


SWALLOWS = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    pass
raise SystemExit(7)
"""


def test_stopping_a_command_while_it_imports_is_one_line_even_where_a_library_swallows_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SWALLOWS)
    code = "import sys; sys.argv = ['slimlm', 'verify', 'x']; from slimlm.cli import main; main()"
    # A shell has its background jobs ignore SIGINT, and their children inherit that.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, "slimlm: stopped\n")
