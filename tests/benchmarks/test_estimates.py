"""The comparison of estimates with runs runs."""

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_scripts import script


def test_an_estimate_stands_beside_its_run(
    llama_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    estimates = script("estimates", monkeypatch)
    # Both are set back at the end: the script is meant for a process of its own.
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    monkeypatch.setattr("slimlm.pipeline.timed", None)
    options = ["--data", str(text_file), "--samples", "2", "--length", "32", "--recipes", "absmax"]
    monkeypatch.setattr(sys, "argv", ["estimates", str(llama_folder), *options])
    estimates.main()
    row = json.loads(capsys.readouterr().out)
    assert (row["recipe"], row["tokens"]) == ("absmax", 64)
    assert row["seconds"][2] == row["seconds"][0] / row["seconds"][1] > 0
    assert row["bits_per_weight"][0] == row["bits_per_weight"][1]
    assert row["bytes"][0] < row["bytes"][1], "the file's header comes on top"
