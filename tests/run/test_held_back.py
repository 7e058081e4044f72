"""The comparison with the original at the end of a run, on windows of the calibration text that were held back."""

from pathlib import Path
from typing import Any

import pytest
import torch

import slimlm
from slimlm import pipeline
from slimlm.calibration.samples import HELD_BACK_TOKENS, Drawn
from slimlm.evaluation.divergence import kl_divergence
from slimlm.evaluation.stored_model import StoredModel
from slimlm.models.dense import open_dense
from slimlm.record import Record
from slimlm.storage import checkpoint
from slimlm.storage.journal import DENSE_OUTPUTS, HELD_BACK, Journal

OPTIONS: dict[str, Any] = {"recipe": "absmax", "samples": 3, "length": 32, "device": "cpu"}


@pytest.mark.parametrize(
    ("length", "shape"),
    [(32, (64, 32)), (512, (4, 512)), (1200, (4, 512)), (700, (4, 512))],
)
def test_held_back_windows_come_after_the_samples_and_hold_two_thousand_tokens_at_most(
    length: int, shape: tuple[int, int]
) -> None:
    windows = torch.arange(80 * length).view(80, length)
    drawn = Drawn.of(windows, 5)
    assert torch.equal(drawn.samples, windows[:5])
    assert drawn.held_back is not None and drawn.held_back.shape == shape
    assert drawn.held_back.numel() <= HELD_BACK_TOKENS and int(drawn.held_back.min()) == 5 * length
    assert len(drawn.held_back.unique()) == drawn.held_back.numel()


def test_where_the_samples_are_all_windows_nothing_is_held_back() -> None:
    assert Drawn.of(torch.zeros(5, 8), 5).held_back is None
    rest = Drawn.of(torch.zeros(5, 8), 4).held_back
    assert rest is not None and rest.shape == (1, 8)


def test_the_divergence_of_the_record_is_that_of_the_two_models(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = pipeline.verify_written

    def noting(*args: Any) -> Any:
        seen.append(args[-1].outputs.tokens)
        return real(*args)

    monkeypatch.setattr(pipeline, "verify_written", noting)
    out = tmp_path / "o"
    found = slimlm.compress(llama_folder, out, data=str(text_file), **OPTIONS).record.divergence
    (held_back,) = seen
    with torch.no_grad():
        p = open_dense(str(llama_folder)).model(held_back).logits[:, :-1].float().log_softmax(-1)
        q = slimlm.load(out, kernels="reference", dtype=torch.float32)(held_back).logits[:, :-1].float().log_softmax(-1)
    assert found is not None and (found.windows, found.length) == tuple(held_back.shape)
    assert found.mean.value == pytest.approx(float(kl_divergence(p, q).mean()), rel=1e-3)
    assert found.same_top.value == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-3)
    assert found.mean.value > 0 and found == Record.from_dict(checkpoint.read_record(out)).divergence


def test_a_text_without_windows_left_is_told_and_nothing_is_measured_in_their_place(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    options = {**OPTIONS, "samples": 100_000}
    found = slimlm.compress(llama_folder, tmp_path / "o", data=str(text_file), notify=told.append, **options)
    assert found.record.divergence is None and "KL" not in str(found)
    assert sum("nothing of it is held back" in words for words in told) == 1


def test_a_resumed_run_does_not_run_the_original_on_them_again(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = slimlm.compress(llama_folder, tmp_path / "whole", data=str(text_file), **OPTIONS).record.divergence
    real = pipeline.verify_written
    monkeypatch.setattr(pipeline, "verify_written", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        slimlm.compress(llama_folder, tmp_path / "o", data=str(text_file), **OPTIONS)
    monkeypatch.setattr(pipeline, "verify_written", real)
    runs: list[int] = []
    outputs = StoredModel.outputs

    def counting(self: StoredModel, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        runs.append(len(ids))
        return outputs(self, ids, *args, **kwargs)

    monkeypatch.setattr(StoredModel, "outputs", counting)
    noted: list[str] = []
    note = Journal.note_tensor
    monkeypatch.setattr(Journal, "note_tensor", lambda self, key, tensor: (noted.append(key), note(self, key, tensor))[1])
    found = slimlm.compress(llama_folder, tmp_path / "o", data=str(text_file), **OPTIONS).record.divergence
    assert found == expected
    assert not {HELD_BACK, DENSE_OUTPUTS} & set(noted)
    # What was written, on a few samples and on the held-back windows; the original on neither.
    assert len(runs) == 2
