"""Timing, and `slimlm bench`."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimlm
from slimlm.bench import layer_speed, model_speed
from slimlm.bench.layer_speed import Call, Contender, Effort, Timing
from slimlm.cli.app import main
from slimlm.report.speed import layer_speed_table, speed_notes, speed_picture
from slimlm.runtime import waiting
from tests.conftest import random_model, save

SHORT = Effort(rounds=2, burst=1e-4, rotated=1_000_000, pause=0.0)


class Clock:
    """Stands still but for what the contenders make of it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def contender(clock: Clock, name: str, seconds: float, copies: int, *, products: int = 1) -> tuple[Contender, list[int]]:
    """One whose every call takes so long, and the copies that it was called with."""
    called: list[int] = []

    def calls(x: Tensor) -> list[Call]:
        def call(copy: int) -> None:
            called.append(copy)
            clock.now += seconds

        return [lambda copy=copy: call(copy) for copy in range(copies)]  # type: ignore[misc]

    return Contender(name, 1, calls, products), called


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(layer_speed, "clock_for", lambda threads: found)
    return found


# Timing


def test_a_race_gives_the_seconds_of_one_product(clock: Clock) -> None:
    one, _ = contender(clock, "one", 2.0, 3)
    several, _ = contender(clock, "several", 2.0, 3, products=4)
    found = layer_speed.race([one, several], torch.ones(1, 4), threads=1, effort=SHORT)
    assert found.timings == {"one": Timing(2.0, 2.0, 2), "several": Timing(0.5, 0.5, 2)}


def test_a_contender_goes_through_all_its_copies_in_turn_and_through_none_twice_in_a_burst(clock: Clock) -> None:
    quick, called = contender(clock, "quick", 1e-6, 5)
    layer_speed.race([quick], torch.ones(1, 4), threads=1, effort=SHORT)
    assert called == [i % 5 for i in range(len(called))]
    # To warm up two calls, then a pass of one untimed and four timed ones in each of two rounds.
    assert len(called) == 2 + 2 * 5


def test_rounds_that_other_programs_disturb_are_repeated_and_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: Iterator[float] = iter([0.9, 0.0, 0.5, 0.02])
    durations = iter([9.0] * 2 + [9.0] * 2 + [1.0] * 2 + [9.0] * 2 + [1.0] * 2)
    monkeypatch.setattr(layer_speed, "taken_elsewhere", lambda before, after: next(shares))

    def calls(x: Tensor) -> list[Call]:
        def call() -> None:
            clock.now += next(durations)

        return [call, call]

    found = layer_speed.race([Contender("one", 1, calls)], torch.ones(1, 4), threads=2, effort=SHORT)
    assert found.timings["one"].seconds == 1.0
    assert found.elsewhere == pytest.approx(0.01)


def test_where_it_never_is_quiet_the_quietest_rounds_count_and_patience_ends(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    asked = iter(shares)
    monkeypatch.setattr(layer_speed, "taken_elsewhere", lambda before, after: next(asked))
    one, _ = contender(clock, "one", 1.0, 2)
    assert layer_speed.race([one], torch.ones(1, 4), threads=2, effort=SHORT).elsewhere == pytest.approx(0.45)
    assert list(asked) == []


def test_a_timing_is_the_median_and_the_20th_percentile() -> None:
    assert Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Timing(3.5, 2.0, 6)
    assert Timing.of([3.0]) == Timing(3.0, 3.0, 1)


def test_copies_hold_as_much_as_is_to_be_rotated() -> None:
    assert [Effort(rotated=100).copies(size) for size in (1, 30, 100, 101)] == [100, 4, 1, 1]


def test_dense_contenders_multiply_by_their_weight() -> None:
    weight, x = torch.arange(6.0).view(2, 3), torch.ones(1, 3)
    for dtype in (torch.float32, torch.bfloat16):
        made = layer_speed.dense("dense", [weight.to(dtype)] * 2)
        assert [call().tolist() for call in made.calls(x)] == [[[3.0, 12.0]]] * 2
        assert made.bytes == 6 * dtype.itemsize


def test_memory_is_read_at_some_rate_and_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    assert 1e7 < layer_speed.read_bandwidth(1, bytes_=4_000_000, rounds=2) < 1e13
    assert torch.get_num_threads() == before


def test_what_others_took_is_a_share_of_the_time_that_passed() -> None:
    assert layer_speed.taken_elsewhere((0.0, 0.0, 0.0), (20.0, 12.0, 2.0)) == 0.5
    # Ticks are coarse: this process may have worked longer than all did.
    assert layer_speed.taken_elsewhere((0.0, 0.0, 0.0), (1.0, 0.5, 0.51)) == 0.0
    assert layer_speed.taken_elsewhere(None, (1.0, 0.5, 0.5)) is None


# The verb


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """The command line in little time; gives standard output and error."""
    quick = model_speed.Settings(prompt_tokens=8, new_tokens=3, repeats=1, effort=SHORT)
    monkeypatch.setattr("slimlm.bench.model_speed.QUICK", quick)

    def typed(*words: str | Path) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["slimlm", "bench", *map(str, words), "--quick", "--threads", "1"])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert ended.value.code in (0, 2)
        return captured.out, captured.err

    return typed


def test_bench_measures_every_layer_and_the_whole_model_at_every_batch(
    run: Callable[..., tuple[str, str]], packed: Path
) -> None:
    result = json.loads(run(packed, "--kernels", "reference", "--json")[0])
    assert result["against"] == "random weights in the same shapes"
    layers, whole = result["layers"], result["generation"]
    ways = {"slimlm", "torch float32", "torch bfloat16"}
    # q, o and gate, up have other shapes than k, v and down.
    shapes = {(48, 48): 4, (24, 48): 4, (88, 48): 4, (48, 88): 2}
    assert {(*row["shape"], row["batch"], row["contender"]) for row in layers} == {
        (*shape, batch, way) for shape in shapes for batch in (1, 4, 16) for way in ways
    }
    assert {tuple(row["shape"]): row["layers"] for row in layers} == shapes
    assert {(row["batch"], row["contender"]) for row in whole} == {(batch, way) for batch in (1, 4, 16) for way in ways}
    assert all(row["seconds"] > 0 and row["kernels"] == "reference" for row in layers)
    assert all(row["ratio"] == 1 for row in layers if row["contender"] == "torch float32")
    assert all(row["new_tokens_per_second"] > 0 and row["prompt_tokens_per_second"] > 0 for row in whole)
    assert {row["decode_path"] for row in whole} == {"fast decode with torch"}


def test_bytes_per_step_are_those_of_all_weights_but_the_embedding(run: Callable[..., tuple[str, str]], packed: Path) -> None:
    result = json.loads(run(packed, "--kernels", "reference", "--batch", 1, "--json")[0])
    model = slimlm.load(packed)
    dense = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, model_speed.CompressedLinear))
    rest = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    by_way = {row["contender"]: row["bytes_per_step"] for row in result["generation"]}
    # The reference multiplies by float32 matrices; what is not compressed stays in its 16 bits.
    assert by_way == {
        "slimlm": 4 * dense + 2 * rest,
        "torch float32": 4 * (dense + rest),
        "torch bfloat16": 2 * (dense + rest),
    }


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_of_a_packed_embedding_a_step_reads_the_head_alone(
    family: str, run: Callable[..., tuple[str, str]], tmp_path: Path, text_file: Path
) -> None:
    save(random_model(family, torch.float16), tmp_path / "dense")
    options = {"recipe": "absmax", "data": str(text_file), "samples": 2, "length": 16}
    slimlm.compress(tmp_path / "dense", tmp_path / "out", embedding_bits=8, **options)
    result = json.loads(run(tmp_path / "out", "--kernels", "reference", "--batch", 1, "--json")[0])
    model = slimlm.load(tmp_path / "out", kernels="reference")
    multiplied = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, model_speed.CompressedLinear))
    rest = sum(p.numel() for p in model.parameters())
    by_way = {row["contender"]: row["bytes_per_step"] for row in result["generation"]}
    assert by_way["slimlm"] == 4 * multiplied + 2 * rest
    assert by_way["torch bfloat16"] == 2 * (multiplied + rest)
    assert [256, 48] in [row["shape"] for row in result["layers"]]
    assert {row["decode_path"] for row in result["generation"]} == {"fast decode with torch"}


def test_kernels_read_what_is_stored_of_a_layer(packed: Path) -> None:
    model = model_speed.opened(str(packed), "auto")
    layer = next(m for m in model.modules() if isinstance(m, model_speed.CompressedLinear))
    stored = sum(tensor.nbytes for tensor in layer.packed().values())
    expected = {"cpu, fast": stored, "reference": 4 * layer.in_features * layer.out_features}
    assert model_speed.read_bytes(layer) == expected[model_speed.describe_backend(layer)]


def test_the_dense_model_may_be_named(run: Callable[..., tuple[str, str]], packed: Path, llama_folder: Path) -> None:
    result = json.loads(run(packed, "--against", llama_folder, "--batch", 2, "--json")[0])
    assert result["against"] == str(llama_folder)
    assert {row["batch"] for row in result["layers"]} == {2}


def test_another_dense_model_is_refused_in_words(run: Callable[..., tuple[str, str]], packed: Path, tmp_path: Path) -> None:
    other = save(random_model("gpt2"), tmp_path / "gpt2")
    assert "has no layer model.layers.0.self_attn.q_proj" in run(packed, "--against", other, "--batch", 1)[1]


def test_a_dense_model_that_would_not_fit_is_left_out_and_a_note_says_so(
    run: Callable[..., tuple[str, str]], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_speed, "total_and_free", lambda: (10_000, 10_000))
    out, err = run(packed, "--batch", 1, "--json")
    result = json.loads(out)
    assert {row["contender"] for row in result["generation"]} == {"slimlm"}
    assert {row["contender"] for row in result["layers"]} == {"slimlm", "torch float32", "torch bfloat16"}
    assert result["against"] is None
    assert "no dense model is measured" in err.replace("\n", " ")


def test_figures_and_a_picture_are_written_where_asked(
    run: Callable[..., tuple[str, str]], packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "figures.json"
    out, err = run(packed, "--batch", 1, "--out", file)
    assert "new tokens/s" in out
    assert "x float32" in out
    result = json.loads(file.read_text())
    assert {"model", "machine", "versions", "read_bandwidth", "layers", "generation", "finished"} <= result.keys()
    assert result["machine"]["waiting_threads"] == waiting.policy()
    assert layer_speed_table(result).title.startswith("time of one product; 1 thread, CPU time")
    policy = f"2 threads ({waiting.policy()}), wall time"
    assert policy in str(layer_speed_table({**result, "threads": 2, "clock": "wall time"}).title)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is missing" in str(speed_picture(result, tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()
    assert file.with_suffix(".png").exists() or "matplotlib is missing" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "figures.txt"], "ends in .json"),
        (["--prompt-tokens", "64"], "the model's context holds 64"),
        (["--batch", "0"], "must each be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    run: Callable[..., tuple[str, str]], packed: Path, words: list[str], said: str
) -> None:
    assert said in run(packed, *words)[1]


def test_notes_name_refusals_and_a_busy_machine() -> None:
    rows: list[dict[str, Any]] = [{"refused": "no kernels for that", "elsewhere": 0.5}]
    notes = speed_notes({"layers": rows, "generation": [], "notes": [], "threads": 2})
    assert "no kernels for that" in notes[0]
    assert "50%" in notes[1]
