"""The wheel, the editable install and the sdist, made by the project's own configuration and hook, offline."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import fake_compiler, needs_compiler

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("hatchling", "editables")),
    reason="hatchling or editables is not installed: python -m pip install '.[test]'",
)
LIBRARY, RECORD = "slimlm/kernels/slimlm_cpu.so", "slimlm/kernels/slimlm_cpu.json"


def make(project: Path, kind: str) -> subprocess.CompletedProcess[str]:
    """What pip asks of the backend, in a process of its own; the result lies in `dist`."""
    (project / "dist").mkdir(exist_ok=True)
    code = f"import hatchling.build; print(hatchling.build.build_{kind}('dist'))"
    return subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)


def made(project: Path, kind: str) -> Path:
    done = make(project, kind)
    assert done.returncode == 0, done.stderr
    return project / "dist" / done.stdout.split()[-1]


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        assert len(set(names)) == len(names)
        return {name: opened.read(name) for name in names}


@needs_compiler
def test_a_wheel_holds_the_library_and_names_the_platform(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLM_KERNELS", "require")
    wheel = made(project, "wheel")
    files = content(wheel)
    tag = wheel.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-")
    if sys.platform == "linux":
        assert tag == "py3-none-" + sysconfig.get_platform().replace("-", "_")
    about = next(text for name, text in files.items() if name.endswith("dist-info/WHEEL")).decode()
    assert f"Tag: {tag}" in about and "Root-Is-Purelib: false" in about
    assert files[LIBRARY][:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    assert "portable" in json.loads(files[RECORD])["variants"]
    # A checkout from which a wheel was made stays as it was.
    assert not list((project / "src").rglob("slimlm_cpu.*"))


@pytest.mark.parametrize("why", ["no compiler", "it fails", "off"])
def test_a_wheel_without_the_library_is_pure_and_holds_the_reason(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "no compiler":
        monkeypatch.setenv("PATH", "")
    elif why == "it fails":
        monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo out of ideas >&2; exit 1"))
    else:
        monkeypatch.setenv("SLIMLM_KERNELS", "off")
    # What an editable install would have left there.
    (project / "src" / LIBRARY).write_text("old")
    wheel = made(project, "wheel")
    files = content(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in files
    words = {"no compiler": "no C++ compiler was found", "it fails": "out of ideas", "off": "SLIMLM_KERNELS=off"}[why]
    assert words in json.loads(files[RECORD])["reason"]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_required_kernels_that_cannot_be_built_fail_the_install_in_words(
    project: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SLIMLM_KERNELS", "require")
    monkeypatch.setenv("PATH", "")
    done = make(project, kind)
    assert done.returncode != 0
    assert "SLIMLM_KERNELS=require, but the CPU kernels were not built: no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


@needs_compiler
def test_an_editable_install_leaves_the_library_in_the_source_tree(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMLM_KERNELS", "require")
    files = content(made(project, "editable"))
    assert LIBRARY not in files
    assert (project / "src" / LIBRARY).is_file() and (project / "src" / RECORD).is_file()


def test_an_sdist_holds_what_builds_the_library_and_no_library(project: Path) -> None:
    for name in (LIBRARY, RECORD):
        (project / "src" / name).write_text("old")
    with tarfile.open(made(project, "sdist")) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"hatch_build.py", "csrc/build.py", "csrc/dispatch.cpp", "csrc/work_avx2.cpp", "pyproject.toml"} <= names
    assert not [name for name in names if "slimlm_cpu" in name]
