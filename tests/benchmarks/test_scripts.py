"""The benchmarks' control flow on tiny shapes; no competitor is needed, and their figures mean nothing here."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import slimlm
from slimlm.calibration.calls import BlockArguments
from slimlm.calibration.capture import BlockInputs, BlockRun
from slimlm.calibration.capture import run as capture_run
from slimlm.core import registry
from slimlm.core.profiling import Call, profiled_functions, profiling
from slimlm.core.solvers.linalg import weighted_square
from slimlm.kernels import native
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import CompressedLinear

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = (64, 256)
LINE = ["--shapes", "64x256", "--batches", "1", "3", "--threads", "1", "--rounds", "1", "--rotated-mb", "1"]


@pytest.fixture(params=["kernel_speed", "generation", "random_checkpoint", "competitors", "results_file", "scaling"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of benchmarks/ as Python sees it when one of them is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    module.main()


def test_the_floors_of_compression_are_those_of_profiled_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.find("joint", "alternation")  # methods are imported when they are asked for
    floors = script("compression", monkeypatch).FLOORS
    assert floors.keys() <= profiled_functions()


def test_the_clock_of_compression_gives_each_section_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compression = script("compression", monkeypatch)
    clock, now = compression.Clock(), iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(compression.time, "process_time", lambda: next(now))
    clock.start()
    error, weights = torch.zeros(4, 6), torch.zeros(6, 6)
    with profiling(clock):
        clock.begin(Call("adapter rounding", "elsewhere", (), {}))
        weighted_square(error, weights)  # counts as rounding, inside it
        clock.end()
    clock.stop()
    assert clock.seconds == {"the rest": 1.0 + 5.0, "adapter rounding": 2.0 + 3.0 + 4.0}
    assert clock.calls == {"adapter rounding": 1, "objective": 1} and not clock.work


def test_the_clock_of_compression_counts_the_products_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    compression = script("compression", monkeypatch)
    clock, block = compression.Clock(), torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False))
    arguments = BlockArguments({("b", 2): ((None,), {})})
    inputs = BlockInputs([torch.zeros(2, 5, 6)], arguments)
    with profiling(clock):
        list(capture_run(BlockRun(block, "b", inputs, torch.device("cpu"))))
    (work,) = clock.work["calibration forward"]
    # 10 tokens: the layer's 36 weights, and each token's products with the 5 of its sample.
    assert work.single == 2 * 10 * 36 + 2 * 10 * 5 * 6


def test_results_of_model_types_of_other_versions_are_dropped_and_not_stamped_with_the_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    families, file = script("families", monkeypatch), tmp_path / "families.json"
    assert families.to_resume(file) == {}
    row = families.Row("llama", kind="LlamaForCausalLM", outcome="works", skipped=("a",))
    families.write(file, {row.key: row})
    assert families.to_resume(file) == {"llama": row}
    file.write_text(json.dumps({**families.about(file), "versions": {**families.versions(), "torch": "1.0"}}))
    assert families.to_resume(file) == {}
    assert "torch 1.0" in capsys.readouterr().out


# Kernels


def test_every_contender_gives_a_row_and_who_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel_speed, competitors = script("kernel_speed", monkeypatch), script("competitors", monkeypatch)
    monkeypatch.setattr(competitors, "find_spec", lambda name: None)
    run(kernel_speed, monkeypatch, *LINE, "--only", "torch float32", "slimlm*g32*", "--results", tmp_path)
    [file] = tmp_path.glob("kernels-*.json")
    results = json.loads(file.read_text())
    assert "onnxruntime and onnx not installed" in results["missing"]["ONNX Runtime"]
    assert "not measured: ONNX Runtime" in capsys.readouterr().out.replace("\n", " ")
    assert ("slimlm" in results["missing"]) == (native.library() is None)
    names = {row["contender"] for row in results["rows"]}
    layers = {name for name in kernel_speed.KINDS if "g32" in name}
    own = {f"slimlm {layer}, {precision}" for layer in layers for precision in ("fast", "precise")}
    assert names == {"torch float32"} | (own if native.library() else set())
    assert {(row["contender"], row["batch"]) for row in results["rows"]} == {(each, b) for each in names for b in (1, 3)}
    [measured] = results["runs"]
    assert {"command", "machine", "versions", "kernel_library"} <= measured.keys()
    for row in results["rows"]:
        assert row["shape"] == list(SHAPE)
        assert row["seconds"] > 0
        assert row["bytes_moved"] > 0
        # 16-bit activations and tables of 12 bits, 8-bit ones and 7 bits, or float32.
        assert row["error"] < (0.05 if "fast" in row["contender"] else 1e-3)


def test_rows_are_replaced_and_keep_the_run_they_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results_file = script("results_file", monkeypatch)
    path = tmp_path / "rows.json"
    for number, rows in enumerate([[("a", 1), ("b", 1)], [("b", 2)], [("a", 3)]]):
        results = results_file.Results(path, ("name",), {"number": number})
        for name, value in rows:
            results.add({"name": name, "value": value})
        results.write()
    found = json.loads(path.read_text())
    # No row of the first run is left.
    assert [each["number"] for each in found["runs"]] == [1, 2]
    assert found["rows"] == [{"name": "a", "value": 3, "run": 1}, {"name": "b", "value": 2, "run": 0}]


def test_what_was_missing_is_so_until_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = script("results_file", monkeypatch).Results(tmp_path / "rows.json", ("name",), {})
    results.missing = {"a": "failed", "b": "failed", "c": "failed"}
    results.add({"name": "a"}, "a", "of a")
    results.found("b")
    assert results.to_dict()["missing"] == {"c": "failed"}


def test_the_tables_come_from_the_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel_speed = script("kernel_speed", monkeypatch)
    run(kernel_speed, monkeypatch, *LINE, "--only", "torch*float*", "--results", tmp_path)
    capsys.readouterr()
    run(kernel_speed, monkeypatch, "--markdown", "--results", tmp_path)
    shown = capsys.readouterr().out
    assert "| torch float32 | 32.00 |" in shown
    assert "64 x 256, one thread, CPU time" in shown


def test_torch_s_own_4_bit_kernel_multiplies_by_the_weight_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_speed, competitors = script("kernel_speed", monkeypatch), script("competitors", monkeypatch)
    effort = kernel_speed.Effort(rotated=1)
    for entry in competitors.torch_int4(SHAPE, 1, effort):
        # Activations and scales of bfloat16.
        assert kernel_speed.error_of(entry, kernel_speed.random_input(4, SHAPE)) < 2e-2
    with pytest.raises(competitors.MissingError, match="no multiple of the group"):
        competitors.torch_int4((64, 80), 1, effort)


@pytest.mark.parametrize(("competitor", "needs"), [("onnx_runtime", "onnxruntime"), ("ggml_products", "llama_cpp")])
def test_competitors_multiply_by_the_weight_that_they_are_given(
    competitor: str, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(needs)
    kernel_speed, competitors = script("kernel_speed", monkeypatch), script("competitors", monkeypatch)
    for entry in getattr(competitors, competitor)(SHAPE, 1, kernel_speed.Effort(rotated=1)):
        assert kernel_speed.error_of(entry, kernel_speed.random_input(4, SHAPE)) < 3e-2, entry.contender.name


# Random checkpoints


@pytest.mark.parametrize("bits", [8, 16])
def test_a_random_checkpoint_opens_and_its_logits_are_finite(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint = script("random_checkpoint", monkeypatch)
    figures = random_checkpoint.write(tmp_path / "out", random_checkpoint.SIZES["tiny"], embedding_bits=bits)
    model = slimlm.load(tmp_path / "out")
    packed = bits == 8
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding) == packed
    assert isinstance(model.get_output_embeddings(), CompressedLinear) == packed
    rows = model.get_input_embeddings()(torch.arange(256))
    assert 0.015 < float(rows.square().mean().sqrt()) < 0.025
    logits = model(torch.arange(20)[None]).logits
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0.01
    assert 3.5 < figures["bits_per_weight"] < 4.5


# Whole models


def test_a_model_is_made_opened_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = script("generation", monkeypatch)
    monkeypatch.setattr(generation, "find_spec", lambda name: None)
    missing = generation.make(tmp_path, "tiny", generation.SIZES["tiny"])
    assert missing.keys() == {"llama.cpp Q4_0", "llama.cpp Q4_K_M"}
    assert "not installed" in missing["llama.cpp Q4_0"]
    jobs = [generation.Job(batch, prompt=4, new=3, threads=1) for batch in (1, 2)]
    ways = ["transformers float32", *(["slimlm fast"] if native.library() else [])]
    for way in ways:
        found = generation.measure_one(way, tmp_path / "tiny" / generation.WAYS[way].files, jobs, 1)
        assert [row["batch"] for row in found["jobs"]] == [1, 2]
        assert all(row["new_tokens_per_second"] > 0 and row["prompt_tokens_per_second"] > 0 for row in found["jobs"])
        assert found["peak_memory"] >= found["memory_before"] > 0


def test_rows_are_medians_and_a_way_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, results_file = script("generation", monkeypatch), script("results_file", monkeypatch)
    speeds = iter([1.0, 5.0, 2.0])

    def measured(way: str, *_: Any) -> dict[str, Any]:
        if way == "slimlm fast":
            raise RuntimeError("out of patience")
        rate = next(speeds)
        jobs = [{"batch": 1, "prompt_tokens_per_second": rate, "new_tokens_per_second": rate}]
        return {"load_seconds": rate, "peak_memory": 3, "memory_before": 1, "elsewhere": None, "jobs": jobs}

    monkeypatch.setattr(generation, "in_its_own_process", measured)
    monkeypatch.setattr(generation, "make", lambda *_: {way: "not here" for way in generation.WAYS if "llama" in way})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "dense").mkdir()
    line = ["--sizes", "tiny", "--batches", "1", "--ways", "slimlm fast", "transformers float32"]
    arguments = generation.read_line(line)
    results = results_file.Results(tmp_path / "rows.json", ("size", "way", "threads", "batch"), {})
    generation.measure_all(arguments, tmp_path, results)
    found = results.to_dict()
    assert found["missing"]["slimlm fast (tiny)"] == "failed: out of patience"
    assert found["missing"]["llama.cpp Q4_0 (tiny)"] == "not here"
    [row] = found["rows"]
    assert (row["way"], row["new_tokens_per_second"], row["rounds"]) == ("transformers float32", 2.0, 3)
    shown = generation.markdown(found)
    assert "| tiny | transformers float32 | 2 | 1 | 2 | 2.0 | 2.0 | 2 bytes |" in shown
    assert "not measured: slimlm fast (tiny): failed: out of patience" in shown


def test_every_script_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script(name, monkeypatch).__doc__
