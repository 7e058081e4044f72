"""csrc/build.py: what can be built is built, and for the rest there is a reason."""

import ctypes
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from slimlm.kernels import native
from tests.packaging.conftest import GUARDS, ROOT, fake_compiler, needs_compiler

HERE = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}.get(platform.machine().lower())


def own(builder: ModuleType) -> set[str]:
    """The variants of this machine's architecture, and the portable one."""
    return {v.name for v in builder.VARIANTS if v.architecture == HERE} | {"portable"}


def said(library: Path) -> list[str]:
    """What the library says it holds."""
    opened = ctypes.CDLL(str(library))
    opened.slimlm_variants.restype = ctypes.c_char_p
    return str(opened.slimlm_variants().decode()).split()


@needs_compiler
def test_every_variant_of_this_architecture_is_built_with_its_flags(builder: ModuleType, sources: Path, tmp_path: Path) -> None:
    library = tmp_path / "out/slimlm_cpu.so"
    record = builder.install(library, "require", sources=sources)
    # A compiler may be too old for one of them; then the record says so.
    refused = {name for name, why in record.left_out.items() if "refuses" in why}
    assert set(record.variants) == own(builder) - refused
    assert set(record.left_out) == set(GUARDS) - set(record.variants)
    assert set(said(library)) == set(record.variants)
    written = json.loads((tmp_path / "out/slimlm_cpu.json").read_text())
    assert (written["reason"], written["variants"], written["version"]) == (None, record.variants, record.version)


@needs_compiler
@pytest.mark.skipif(HERE != "x86_64", reason="the refused flags are those of x86-64")
def test_a_variant_whose_flags_the_compiler_refuses_is_left_out_and_the_dispatcher_knows(
    builder: ModuleType, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shlex.join(builder.find_compiler())
    refuses = f'case "$*" in *avx512vnni*) echo unknown option >&2; exit 1;; esac\nexec {real} "$@"'
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, refuses))
    library = tmp_path / "slimlm_cpu.so"
    record = builder.install(library, "require", sources=sources)
    assert "avx512" not in record.variants
    assert record.left_out["avx512"].startswith("the compiler refuses -mavx512f")
    assert said(library) == ["avx2", "portable"]


def test_a_compiler_that_fails_leaves_the_reason_and_no_older_library(
    builder: ModuleType, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "echo the disk is on fire >&2; exit 3"))
    library = tmp_path / "slimlm_cpu.so"
    library.write_text("of an earlier build")
    record = builder.install(library, "auto", sources=sources)
    assert "status 3" in record.reason and "the disk is on fire" in record.reason
    assert json.loads(library.with_suffix(".json").read_text())["reason"] == record.reason
    assert not library.exists()


def test_without_a_compiler_the_reason_names_those_looked_for(
    builder: ModuleType, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert "none of c++, g++ and clang++" in builder.install(tmp_path / "slimlm_cpu.so", "auto", sources=sources).reason
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "no-such-compiler" in builder.install(tmp_path / "slimlm_cpu.so", "auto", sources=sources).reason


def test_a_compiler_that_cannot_be_started_is_told_of(
    builder: ModuleType, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Path(fake_compiler(tmp_path, ""))
    compiler.write_text("#!/no/such/shell\n")
    monkeypatch.setenv("CXX", str(compiler))
    assert "cannot be started" in builder.install(tmp_path / "slimlm_cpu.so", "auto", sources=sources).reason


def test_required_kernels_that_cannot_be_built_fail(
    builder: ModuleType, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(builder.NotBuiltError, match=r"SLIMLM_KERNELS=require, but .* no C\+\+ compiler was found"):
        builder.install(tmp_path / "slimlm_cpu.so", "require", sources=sources)


def test_off_builds_nothing_and_removes_what_was_built(builder: ModuleType, sources: Path, tmp_path: Path) -> None:
    library = tmp_path / "slimlm_cpu.so"
    library.write_text("of an earlier build")
    assert "SLIMLM_KERNELS=off" in builder.install(library, "off", sources=sources).reason
    assert not library.exists()


def test_a_wish_that_is_none_is_refused(builder: ModuleType, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(builder.NotBuiltError, match="SLIMLM_KERNELS=yes: it is one of auto, require, off"):
        builder.install(tmp_path / "slimlm_cpu.so", "yes", sources=sources)


def test_a_folder_without_sources_is_told_of(builder: ModuleType, tmp_path: Path) -> None:
    assert builder.install(tmp_path / "slimlm_cpu.so", "auto", sources=tmp_path).reason == "csrc holds no .cpp files"


@needs_compiler
def test_an_error_in_a_source_names_the_file_and_the_compiler_s_words(
    builder: ModuleType, sources: Path, tmp_path: Path
) -> None:
    (sources / "wrong.cpp").write_text("#error this is wrong\n")
    reason = builder.install(tmp_path / "slimlm_cpu.so", "auto", sources=sources).reason
    assert "failed at wrong.cpp" in reason and "this is wrong" in reason


@needs_compiler
def test_a_library_that_lacks_a_function_is_not_installed(builder: ModuleType, sources: Path, tmp_path: Path) -> None:
    (sources / "lacks.cpp").write_text('int nowhere();\nextern "C" int lacks() { return nowhere(); }\nauto* kept = &lacks;\n')
    library = tmp_path / "slimlm_cpu.so"
    record = builder.install(library, "auto", sources=sources)
    assert "nowhere" in record.reason
    assert not library.exists()


@needs_compiler
def test_a_process_that_has_the_old_library_open_keeps_it(builder: ModuleType, sources: Path, tmp_path: Path) -> None:
    library = tmp_path / "slimlm_cpu.so"
    builder.install(library, "require", sources=sources)
    with library.open("rb") as old:
        before = library.stat().st_ino
        builder.install(library, "require", sources=sources)
        assert library.stat().st_ino != before
        assert old.read(4) in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csrc", "slimlm_cpu.json", "slimlm_cpu.so"]


def test_files_are_linked_from_few_features_to_many(builder: ModuleType) -> None:
    names = ["gemm_avx512.cpp", "a_avx2.cpp", "b.cpp", "z_avx2.cpp", "a_neon_more.cpp"]
    ordered = builder._objects_in_link_order({Path(name): Path(name).with_suffix(".o") for name in names})
    assert [path.name for path in ordered] == ["a_neon_more.o", "b.o", "a_avx2.o", "z_avx2.o", "gemm_avx512.o"]


def test_the_build_and_the_runtime_know_the_same_variants_best_first(builder: ModuleType) -> None:
    assert {*native.NEEDS} == {v.name for v in builder.VARIANTS} | {"portable"}
    order = list(native.NEEDS)
    for fewer, more in [("avx2", "avx512"), ("neon", "neondot"), ("portable", "neon"), ("portable", "avx2")]:
        assert order.index(more) < order.index(fewer)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.slow  # zig, where it is the cross-compiler, first builds its C++ library: minutes
def test_the_files_for_arm_compile() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "csrc/check_arm.sh"], env=environment, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
