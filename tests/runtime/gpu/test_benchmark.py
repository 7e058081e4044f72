"""benchmarks/gpu.py end to end in Triton's interpreter, on tiny shapes; its figures mean nothing here."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from slimlm.runtime.gpu import device

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.mark.skipif(device.lacks_triton() is not None or not device.interpreted(), reason="it takes Triton's interpreter")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's dependencies
def test_every_section_gives_its_rows_and_who_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--batches", "2", "--results", str(tmp_path)])
    gpu = importlib.import_module("gpu")
    gpu.main()
    found = json.loads((tmp_path / "gpu-interpreted.json").read_text())
    rows = {
        name: [r for r in found["rows"] if r["section"] == name] for name in ("ceilings", "correctness", "layers", "generation")
    }
    assert len(rows["ceilings"]) == 1
    assert {(r["contender"], r["dtype"]) for r in rows["correctness"]} == {
        (name, dtype) for name in gpu.KINDS for dtype in ("float16", "bfloat16")
    }
    assert {r["contender"] for r in rows["layers"]} == {"cuBLAS", *gpu.KINDS} == {r["contender"] for r in rows["generation"]}
    assert all(r["seconds"] > 0 for r in rows["layers"])
    assert found["missing"]["cuSPARSELt 2:4"] == "it needs a GPU"
    shown = capsys.readouterr().out
    assert "| slimlm 2:4 one scale | 3.00 |" in shown and "- not measured: cuSPARSELt 2:4: it needs a GPU" in shown


@pytest.mark.skipif(device.lacks_triton() is not None or not device.interpreted(), reason="it takes Triton's interpreter")
def test_a_random_layer_multiplies_as_its_unpacked_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu = importlib.import_module("gpu")
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).half()
    for kind in gpu.KINDS.values():
        ready = gpu.random_ready((64, 256), kind, torch.device("cpu"))
        narrow, wide = (gpu.Gpu().matmul(x.to(dtype), ready) for dtype in (torch.float16, torch.float32))
        assert float((narrow - wide).abs().max()) < 4e-3 * float(wide.abs().max())
