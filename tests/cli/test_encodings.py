"""Text and names in any encoding: what a terminal cannot show is escaped, and what is no text is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Line

SHORT = ("--recipe", "absmax", "--samples", "2", "--length", "16")


def typed(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-m", "slimlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


# Slow: a process of its own that imports torch and transformers; the first case holds the same for every change.
@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", "größe\\u4f60"), pytest.param("ascii", "gr\\xf6\\xdfe\\u4f60", marks=pytest.mark.slow)]
)
def test_folders_and_texts_may_have_any_name_and_a_character_that_the_output_lacks_is_escaped(
    llama_folder: Path, text_file: Path, tmp_path: Path, encoding: str, shown: str
) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "modèle"))
    text = Path(shutil.copy(text_file, tmp_path / "tëxt数.txt"))
    folder = tmp_path / "größe你"
    done = typed("compress", model, "--out", folder, "--data", text, *SHORT, LC_ALL="C", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert shown in "".join(line.strip() for line in done.stdout.decode(encoding).splitlines())
    record = json.loads((tmp_path / "größe你/slimlm.json").read_text(encoding="utf-8"))
    assert (record["model"], record["calibration"]["data"]) == ("modèle", "tëxt数.txt")


@pytest.mark.parametrize("verb", [("generate", "--prompt"), ("eval", "--text"), ("compress", "--out")])
def test_an_argument_that_is_no_text_is_refused(line: Line, packed: Path, verb: tuple[str, str]) -> None:
    said = line.refused(verb[0], packed, verb[1], os.fsdecode(b"a\xff"))
    assert "'a\\udcff' holds bytes that are no utf-8 text" in said


@pytest.mark.slow  # a process of its own that imports torch and transformers, for a setting that few make
def test_an_error_handler_of_the_users_own_stays(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "你"))
    done = typed("verify", folder, PYTHONIOENCODING="ascii:replace")
    assert done.returncode == 0 and b"?" in done.stdout and b"\\u4f60" not in done.stdout
