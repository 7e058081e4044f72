"""benchmarks/gpu.py end to end in Triton's interpreter, on tiny shapes; its figures mean nothing here."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slimlm.runtime.gpu import device

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
CPU = torch.device("cpu")
interpreter = pytest.mark.skipif(
    device.lacks_triton() is not None or not device.interpreted(), reason="it takes Triton's interpreter"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


def opened(gpu: ModuleType, path: Path, budget: float = 100) -> Any:
    """A run on the CPU that has measured nothing."""
    return gpu.Run(CPU, budget, gpu.Results(path / "rows.json", ("section", "contender", "shape", "batch", "dtype"), {}))


@pytest.mark.slow  # The whole benchmark in the interpreter: minutes.
@interpreter
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's dependencies
def test_every_section_gives_its_rows_and_who_is_missing_is_named(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--batches", "2", "--budget", "3600", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    gpu.main()
    found = json.loads((tmp_path / "gpu-interpreted.json").read_text())
    rows = {
        name: [r for r in found["rows"] if r["section"] == name] for name in ("ceilings", "correctness", "layers", "generation")
    }
    assert len(rows["ceilings"]) == 1
    assert {(r["contender"], r["dtype"]) for r in rows["correctness"]} == {
        *((name, dtype) for name in gpu.KINDS for dtype in ("float16", "bfloat16")),
        *((f"{name}, two at once", "bfloat16") for name in gpu.KINDS),
    }
    assert {r["contender"] for r in rows["layers"]} == {"cuBLAS", *gpu.KINDS} == {r["contender"] for r in rows["generation"]}
    assert all(r["seconds"] > 0 for r in rows["layers"])
    assert all(r["counted"].startswith("tokens 2 to 3") and r["prompt_seconds"] > 0 for r in rows["generation"])
    assert found["missing"]["cuSPARSELt 2:4"] == "it needs a GPU"
    shown = capsys.readouterr().out
    assert "| slimlm 2:4 one scale | 3.00 |" in shown and "- not measured: cuSPARSELt 2:4: it needs a GPU" in shown


@interpreter
def test_a_random_layer_multiplies_as_its_unpacked_weight(gpu: ModuleType) -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).half()
    for kind in gpu.KINDS.values():
        ready = gpu.random_ready((64, 256), kind, torch.device("cpu"))
        narrow, wide = (gpu.Gpu().matmul(x.to(dtype), ready) for dtype in (torch.float16, torch.float32))
        assert float((narrow - wide).abs().max()) < 4e-3 * float(wide.abs().max())


def test_what_is_checked_is_laid_out_as_what_is_timed(gpu: ModuleType) -> None:
    """So the kernels that the checks compile are those that are timed."""

    def form(factor: Any) -> Any:
        tensors = (factor.words, factor.scale, factor.codebook)
        return [None if t is None else (t.dtype, t.ndim, t.shape[2:] if t.ndim == 3 else t.numel() == 1) for t in tensors]

    for kind in gpu.KINDS.values():
        parts = gpu.random_parts((128, 512), kind)
        packed = gpu.layout.lay_out(gpu.CompressedLinear.from_parts(parts, None).stored())
        made = gpu.random_ready((128, 512), kind, CPU).layer
        assert form(packed.base) == form(made.base)
        assert (packed.right is None) == (made.right is None) == (not kind.adapter)
        if kind.adapter:
            assert form(packed.right) == form(made.right)
            assert form(packed.tail.packed) == form(made.tail.packed)


@pytest.mark.parametrize("error", [AssertionError(), OSError("no space"), KeyError("x"), RuntimeError("two\nlines")], ids=repr)
def test_an_odd_failure_is_one_row_that_is_missing_until_it_is_measured(
    gpu: ModuleType, tmp_path: Path, error: Exception
) -> None:
    run = opened(gpu, tmp_path)

    def fails() -> dict[str, Any]:
        raise error

    run.attempt("a 64 x 64", "a", 10, fails)
    run.attempt("b 64 x 64", "b", 10, lambda: {"section": "layers", "contender": "b"})
    assert list(run.results.missing) == ["a 64 x 64"]
    assert run.results.missing["a 64 x 64"].startswith(f"failed: {type(error).__name__}: ")
    assert "\n" not in run.results.missing["a 64 x 64"]
    assert [row["contender"] for row in run.results.rows.values()] == ["b"]
    again = opened(gpu, tmp_path)
    again.attempt("a 64 x 64", "a", 10, lambda: {"section": "layers", "contender": "a"})
    assert again.results.missing == {}


def test_an_item_that_takes_too_long_ends_and_what_there_is_no_time_for_is_named(gpu: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(gpu.LateError, match="took longer"), gpu.limited(0.1):
        time.sleep(20)
    run = opened(gpu, tmp_path, budget=1)
    run.attempt("late", "late", 10, lambda: pytest.fail("begun"))
    assert run.results.missing == {"late": "the budget of 1 s was spent"}


def test_a_card_that_is_lost_is_named_and_asked_for_nothing_more(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(gpu, tmp_path)
    monkeypatch.setattr(gpu, "unfit", lambda where: "captures nothing more: it says so")
    run.attempt("a", "a", 10, lambda: {}["x"])
    run.attempt("b", "b", 10, lambda: pytest.fail("begun"))
    assert run.results.missing["b"] == "after a failed, the GPU captures nothing more: it says so"


def test_a_kind_whose_check_fails_is_not_timed(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(gpu, tmp_path)
    name = next(iter(gpu.KINDS))
    monkeypatch.setattr(gpu, "check", lambda name, where: 1 / 0)
    found = gpu.checked(CPU, 10)
    assert found[name] == "ZeroDivisionError: division by zero"
    run.wrong.update(found)
    gpu.measure_writing(name, gpu.KINDS[name], 1, run, 0)
    gpu.measure_layer("tiny", (64, 256), 1, run, gpu.own_contenders)
    assert [row["contender"] for row in run.results.rows.values()] == ["cuBLAS"]


def test_the_share_of_the_roof_is_that_of_the_weights_bytes_alone(gpu: ModuleType, tmp_path: Path) -> None:
    layer = {"section": "layers", "shape": [8192, 28672], "batch": 1, "bits_per_weight": 3.0, "bytes": 3e6}
    rows = [
        {"section": "ceilings", "copy": 3e12, "matrix": 1e15},
        {**layer, "contender": "cuBLAS", "seconds": 4e-6, "bytes": 6e6},
        {**layer, "contender": "ours", "seconds": 1.25e-6},
    ]
    shown = gpu.markdown({"rows": rows, "missing": {}})
    assert "|  | bits/weight | batch 1, us | share of the roof at 1 |" in shown
    assert "| ours | 3.00 | 1.2 (3.20) | 80% |" in shown and "| cuBLAS | 3.00 | 4.0 (1.00) | 50% |" in shown


def test_the_tables_are_put_where_the_page_has_room_for_them(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "performance.md"
    page.write_text((FOLDER.parent / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    run = {"card": "NVIDIA Some Card"}
    data = {"runs": [run], "missing": {"all": "too slow"}, "rows": []}
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--into", str(page), "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no GPU was measured"):
        gpu.main()
    for name in ("interpreted", "nvidia-some-card"):
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(data), encoding="utf-8")
    for _ in range(2):
        gpu.main()
        text = page.read_text(encoding="utf-8")
        assert text.count("### NVIDIA Some Card\n\n- not measured: all: too slow\n") == 1
        assert "No GPU has run it yet" not in text and "## What 2:4 brings" in text


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("print('[{\"error\": 0.5}]')", [{"error": 0.5}]),
        ('print(\'{"failed": "it is wrong"}\')', "it is wrong"),
        ("import sys; sys.exit(3)", "its check ended with status 3"),
        ("import time; time.sleep(60)", "its check took too long"),
    ],
)
def test_a_process_that_checks_is_believed_or_named(gpu: ModuleType, code: str, found: object) -> None:
    process = gpu.subprocess.Popen([sys.executable, "-c", code], stdout=gpu.subprocess.PIPE, text=True)
    assert gpu.answer(process, 1 if "sleep" in code else 60) == found
