"""slimlm doctor shows the facts and what to do; nothing that is missing makes it fail."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from slimlm.cli import diagnosis
from slimlm.cli.app import main
from slimlm.kernels import native, processor

VARIANTS = tuple(native.Variant(name, False, False, "not built") for name in native.NEEDS)
NOTHING = native.Status("slimlm_cpu.so", "no C++ compiler was found", None, VARIANTS, None, None)


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints; its status is 0."""
    monkeypatch.setattr(sys, "argv", ["slimlm", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return capsys.readouterr().out


def with_kernels(monkeypatch: pytest.MonkeyPatch, status: native.Status) -> None:
    monkeypatch.delenv(native.OVERRIDE, raising=False)
    monkeypatch.setattr(native, "status", lambda: status)


def test_as_json_the_facts_are_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(typed(monkeypatch, capsys, "--json"))
    assert found["versions"]["python"].startswith("3.")
    assert {"slimlm", "torch", "transformers"} <= found["versions"].keys()
    assert found["threads"] >= 1 and found["cores"] >= 1
    assert [v["name"] for v in found["kernels"]["variants"]] == list(native.NEEDS)
    # There is a kernel, or there is a reason and a remedy.
    assert (found["kernels"]["active"] is None) == (found["kernels"]["reason"] is not None)
    assert found["kernels"]["active"] or found["advice"]


@pytest.mark.parametrize(
    ("platform", "reason", "words"),
    [
        (
            "linux",
            "no C++ compiler was found",
            "Install a C++ compiler (apt install g++, or dnf install gcc-c++) and",
        ),
        ("darwin", "no C++ compiler was found", "xcode-select --install"),
        ("linux", "SLIMLM_KERNELS=off was set when slimlm was installed", "Reinstall without SLIMLM_KERNELS=off"),
        ("linux", "c++ failed at a.cpp", "Once that is put right, reinstall"),
        ("win32", "the CPU kernels are not built on Windows yet", "WSL has them"),
    ],
)
def test_the_advice_fits_the_reason(monkeypatch: pytest.MonkeyPatch, platform: str, reason: str, words: str) -> None:
    monkeypatch.delenv(native.OVERRIDE, raising=False)
    monkeypatch.setattr(diagnosis.sys, "platform", platform)
    (advice,) = diagnosis._about_kernels(replace(NOTHING, reason=reason))
    assert "no CPU kernels" in advice and words in advice


def test_a_wrong_library_named_by_hand_is_to_be_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.OVERRIDE, "/elsewhere.so")
    (advice,) = diagnosis._about_kernels(
        replace(NOTHING, reason="SLIMLM_KERNEL_LIBRARY names /elsewhere.so, which is not there")
    )
    assert "Unset SLIMLM_KERNEL_LIBRARY" in advice


def test_without_kernels_the_command_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_kernels(monkeypatch, NOTHING)
    said = typed(monkeypatch, capsys)
    assert "none: no C++ compiler was found" in said
    assert "python -m pip install --force-reinstall --no-deps ." in said
    assert "no problems found" not in said


def test_a_faster_variant_that_the_compiler_refused_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "features", lambda: frozenset(processor.INTERESTING))
    known = {
        "avx512": native.Variant("avx512", False, False, "not built: the compiler refuses -mavx512vnni"),
        "avx2": native.Variant("avx2", True, True, None),
    }
    status = replace(NOTHING, reason=None, active="avx2", variants=tuple(known.get(v.name, v) for v in VARIANTS))
    (advice,) = diagnosis._about_kernels(status)
    assert "could run the variant avx512, but it was not built: the compiler refuses -mavx512vnni" in advice
    # A processor that could not run it gets no message.
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2", "fma", "f16c"}))
    assert diagnosis._about_kernels(status) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_kernels_are_missing_for_that_reason_and_nothing_is_advised() -> None:
    found = diagnosis.examine()
    assert found.gpu_kernels == f"there is no GPU: {found.no_gpu}"
    assert not any("GPU" in words for words in found.advice)


def test_a_gpu_without_its_kernels_is_told_of() -> None:
    [advice] = diagnosis._about_gpu(("a card",), "Triton is not installed")
    assert advice == "slimlm has no kernels for a card, and compressed layers are dense there: Triton is not installed"
    assert diagnosis._about_gpu(("a card",), None) == []


@pytest.mark.parametrize(("free", "pieces"), [(1_000_000_000, 1), (50_000_000_000, 0), (None, 0)])
def test_little_disk_is_reported(free: int | None, pieces: int) -> None:
    assert len(diagnosis._about_disk(free)) == pieces
