"""KL divergence from the original, agreement about the most probable token, and standard errors."""

import math
from pathlib import Path

import pytest
import torch

import slimlm
from slimlm.core.errors import DataError
from slimlm.evaluation.divergence import divergence_of, kl_divergence, mean_of, percentile_of, predictions_of
from slimlm.evaluation.perplexity import perplexity, pieces_of
from slimlm.evaluation.samples import text_windows
from slimlm.models.dense import open_dense
from tests.conftest import Checkpoints, random_model, save


def test_kl_of_a_vocabulary_of_three_equals_the_sum_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(by_hand, rel=1e-6)
    assert by_hand == pytest.approx(0.25 * math.log(2))


def test_a_token_that_the_original_excludes_adds_nothing_and_one_that_only_the_model_excludes_is_infinite() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(kl_divergence(q, p)) == math.inf


def test_a_model_has_no_divergence_from_itself_and_agrees_everywhere(llama_folder: Path, text_file: Path) -> None:
    found = slimlm.evaluate(llama_folder, against=llama_folder, text=text_file, length=32, tokens=256, device="cpu")
    assert found.divergence is not None and found.rise is not None
    assert found.divergence.mean.value == found.divergence.maximum == found.rise.value == 0
    assert found.divergence.same_top.value == 1
    assert (found.windows, found.length, found.tokens) == (8, 32, 8 * 31)


def test_a_model_run_from_its_files_gives_the_figures_of_the_whole_logits(checkpoints: Checkpoints, text_file: Path) -> None:
    made = checkpoints()
    options = {"against": made.dense, "text": text_file, "length": 48, "tokens": 480, "device": "cpu", "kernels": "reference"}
    in_memory = slimlm.evaluate(made.out, **options)  # type: ignore[arg-type]
    in_files = slimlm.evaluate(made.out, **options, memory=1)  # type: ignore[arg-type]
    dense, packed = open_dense(str(made.dense)), slimlm.load(made.out, dtype=torch.float32, kernels="reference")
    assert dense.tokenizer is not None
    windows = text_windows(dense.tokenizer, str(text_file), length=48, context=None, at_most=480, notify=lambda _: None)
    with torch.no_grad():
        p, q = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (dense.model, packed))
    kl = (p.exp() * (p - q)).sum(-1)
    for found in (in_memory, in_files):
        assert found.divergence is not None and found.models[0].perplexity is not None
        # float32 logits against float32 logits, sums in float64
        assert found.divergence.mean.value == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-6)
        assert found.divergence.maximum == pytest.approx(float(kl.max()), rel=1e-4, abs=1e-5)
        assert found.divergence.same_top.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=3e-3)
        assert found.models[0].perplexity.value == pytest.approx(perplexity(packed, windows).value, rel=1e-5)


def test_pieces_do_not_change_the_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(11, (3, 10), generator=generator)
    p, q = torch.randn(2, 3, 10, 11, generator=generator)
    whole = predictions_of([q], windows, pieces := pieces_of(windows, 11), [p])
    assert len(pieces) == 1
    small = [(slice(row, row + 1), slice(low, low + 4)) for row in range(3) for low in range(0, 10, 4)]
    cut = predictions_of([q[piece] for piece in small], windows, small, [p[piece] for piece in small])
    assert divergence_of(cut) == divergence_of(whole)


def test_standard_errors_fall_as_the_root_of_the_number_of_windows() -> None:
    values = torch.rand(2500, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for measure in (mean_of, lambda v: percentile_of(v, 0.5)):
        few, many = measure(values[:100]).standard_error, measure(values).standard_error
        assert few is not None and many is not None
        # 99 degrees of freedom leave the estimate from 100 windows an uncertainty of 7 %, and that of a density somewhat more.
        assert few / many == pytest.approx(5, rel=0.35)


def test_tokens_that_are_the_same_within_a_window_count_once() -> None:
    windows = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone, repeated = mean_of(windows), mean_of(windows.expand(50, 40))
    assert repeated.standard_error == pytest.approx(alone.standard_error)


def test_percentiles_are_linear_between_neighbours_and_one_window_has_no_error() -> None:
    values = torch.arange(101.0)[None]
    assert percentile_of(values, 0.99).value == 99 and percentile_of(values, 0.5).value == 50
    assert percentile_of(torch.tensor([[0.0, 1.0]]), 0.25).value == 0.25
    assert percentile_of(values, 0.5).standard_error is None and mean_of(values).standard_error is None


def test_the_standard_error_of_a_median_covers_the_true_one() -> None:
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        found = percentile_of(torch.rand(40, 50, generator=generator, dtype=torch.float64), 0.5)
        assert found.standard_error is not None
        covered += abs(found.value - 0.5) < 2 * found.standard_error
    assert 180 <= covered <= 200


def test_models_with_different_vocabularies_are_refused(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    other = random_model("llama")
    other.resize_token_embeddings(300)
    save(other, tmp_path / "other")
    with pytest.raises(DataError, match="different vocabularies"):
        slimlm.evaluate(llama_folder, against=tmp_path / "other", text=text_file, length=32, device="cpu")
