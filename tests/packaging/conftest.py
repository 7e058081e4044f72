"""Small kernels of the tests' own, so that what is tested is the build and not what csrc holds."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DISPATCH = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int slimlm_abi(void) { return 1; }
EXPORT const char* slimlm_variants(void) {
    return ""
#ifndef SLIMLM_NO_AVX512
    "avx512 "
#endif
#ifndef SLIMLM_NO_AVX2
    "avx2 "
#endif
#ifndef SLIMLM_NO_NEONDOT
    "neondot "
#endif
#ifndef SLIMLM_NO_NEON
    "neon "
#endif
    "portable";
}
"""
GUARDS = {"avx2": "__AVX2__", "avx512": "__AVX512VNNI__", "neon": "__ARM_NEON", "neondot": "__ARM_FEATURE_DOTPROD"}


def load_builder() -> ModuleType:
    """csrc/build.py, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("slimlm_kernel_build", ROOT / "csrc/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def has_compiler() -> bool:
    try:
        load_builder().find_compiler()
    except Exception:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler on this machine")


def write_sources(folder: Path) -> Path:
    """A dispatcher, and a file per variant that refuses to be compiled without its flags."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dispatch.cpp").write_text(DISPATCH)
    for name, macro in GUARDS.items():
        text = f"#ifndef {macro}\n#error no {macro}\n#endif\nint slimlm_{name}() {{ return 1; }}\n"
        (folder / f"work_{name}.cpp").write_text(text)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "csrc")


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    return load_builder()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the person at the keyboard has set for builds."""
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "ARCHFLAGS", "SLIMLM_KERNELS", "SLIMLM_KERNEL_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small copy of the project: its build configuration and hook, and almost no package."""
    folder = tmp_path / "project"
    write_sources(folder / "csrc")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "csrc/build.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("slimlm_cpu.*\n")
    for name in ("src/slimlm/__init__.py", "src/slimlm/kernels/__init__.py", "examples/pystd-5m/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def fake_compiler(folder: Path, text: str) -> str:
    """An executable script in a folder of its own."""
    path = folder / "bin" / "fake-c++"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)
