"""The kernels' library: found, opened once, and where it cannot be used, a reason."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from slimlm.kernels import native, processor

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on this machine")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the library is looked for; nothing is there yet."""
    path = tmp_path / "slimlm_cpu.so"
    monkeypatch.delenv(native.OVERRIDE, raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    return path


def compiled(path: Path, *, abi: int = native.ABI, variants: str = "avx2 portable") -> None:
    """A library that says this of itself."""
    assert COMPILER is not None
    source = path.with_suffix(".cpp")
    source.write_text(
        f'extern "C" int slimlm_abi(void) {{ return {abi}; }}\n'
        f'extern "C" const char* slimlm_variants(void) {{ return "{variants}"; }}\n'
    )
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)


def record(path: Path, **about: object) -> None:
    path.with_suffix(".json").write_text(json.dumps({"reason": None, **about}))


def why_not(status: native.Status) -> dict[str, str | None]:
    return {variant.name: variant.why_not for variant in status.variants}


def test_the_reason_of_the_build_is_the_reason(place: Path) -> None:
    record(place, reason="no C++ compiler was found", variants=[], left_out={})
    status = native.status()
    assert native.library() is None
    assert (status.reason, status.active) == ("no C++ compiler was found", None)
    assert set(why_not(status).values()) == {"not built"}


@pytest.mark.parametrize("text", [None, "", "[]", "not json"])
def test_a_copy_without_a_readable_record_says_that_it_was_never_built(place: Path, text: str | None) -> None:
    if text is not None:
        place.with_suffix(".json").write_text(text)
    reason = native.status().reason
    assert reason is not None and "no record of a build" in reason


def test_a_named_library_that_is_not_there_is_told_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.OVERRIDE, str(place.with_name("other.so")))
    reason = native.status().reason
    assert reason is not None and "SLIMLM_KERNEL_LIBRARY names" in reason and "other.so" in reason


def test_a_file_that_is_no_library_is_told_of(place: Path) -> None:
    place.write_text("not a library")
    reason = native.status().reason
    assert reason is not None and "cannot be opened" in reason


@needs_compiler
def test_a_library_of_another_version_is_not_used(place: Path) -> None:
    compiled(place, abi=native.ABI + 1)
    reason = native.status().reason
    assert native.library() is None
    assert reason is not None and f"has interface {native.ABI + 1}, and this version of slimlm needs {native.ABI}" in reason


@needs_compiler
def test_what_is_not_active_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(place)
    record(
        place,
        compiler="c++",
        version="c++ 1.0",
        flags=["-O3"],
        variants=["avx512", "avx2", "portable"],
        left_out={"neon": "it is for aarch64", "neondot": "it is for aarch64"},
    )
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2", "fma", "f16c", "avx512f"}))
    status = native.status()
    assert (status.reason, status.active, status.library) == (None, "avx2", str(place))
    assert (status.compiler, status.flags) == ("c++: c++ 1.0", "-O3")
    assert why_not(status) == {
        "avx512": "the processor lacks avx512bw, avx512vl, avx512dq, avx512vnni",
        "avx2": None,
        "neondot": "not built: it is for aarch64",
        "neon": "not built: it is for aarch64",
        "portable": "it would run, but avx2 is faster",
    }
    assert [variant.name for variant in status.variants if variant.active] == ["avx2"]


@needs_compiler
def test_a_processor_with_everything_that_may_not_use_it_is_told_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(place)
    record(place, variants=["avx512", "avx2", "portable"])
    monkeypatch.setattr(processor, "features", lambda: frozenset(processor.INTERESTING))
    assert "operating system does not allow it" in (why_not(native.status())["avx512"] or "")


@needs_compiler
def test_a_named_library_is_used_and_opened_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place.with_name("other.so")
    compiled(other, variants="portable")
    monkeypatch.setenv(native.OVERRIDE, str(other))
    assert native.status().active == "portable"
    assert native.library() is native.library() is not None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("processor : 0\nmodel name : A B\nflags : fpu avx2 fma avx512_vnni\n\nprocessor : 1\n", {"avx2", "fma", "avx512vnni"}),
        ("processor : 0\nFeatures : fp asimd asimddp\n", {"neon", "dotprod"}),
        ("", set()),
    ],
)
def test_linux_s_names_of_instructions_become_the_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: set[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("sys.platform", "linux")
    assert processor.features.__wrapped__() == found


def test_every_need_of_a_variant_is_looked_for() -> None:
    assert {feature for needs in native.NEEDS.values() for feature in needs} <= set(processor.INTERESTING)
