"""docs/models.md says of every class of the installed transformers what slimlm does with it, and it is true."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.tiny_models import VARIANTS, tiny_model
from slimlm.models.experts import fused_in, take_apart
from slimlm.runtime.linear import CompressedLinear
from tests.benchmarks.test_scripts import FOLDER, script

PAGE = FOLDER.parent / "docs" / "models.md"


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that tries all models and writes the page."""
    return script("families", monkeypatch)


def tried_with(families: Any) -> str:
    """The version of transformers that the results are about."""
    return families.about(families.RESULTS)["versions"]["transformers"]


def test_the_page_shows_the_results(families: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    written = page.split(families.BEGIN)[1].split(families.END)[0].strip()
    assert written == families.section(families.RESULTS)


def test_the_page_names_every_model_of_the_installed_transformers(families: Any) -> None:
    if tried_with(families) != transformers.__version__:
        pytest.skip(f"the page is about transformers {tried_with(families)}, {transformers.__version__} is installed")
    rows = families.results(families.RESULTS)
    expected = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(" ".join(key) for key in VARIANTS)}
    assert rows.keys() == expected
    page = PAGE.read_text(encoding="utf-8")
    assert [key for key in expected if f"\n| {key} |" not in page] == []


@pytest.mark.slow
def test_every_model_does_what_the_page_says(families: Any, tmp_path: Path) -> None:
    # Minutes: some two hundred models are compressed.
    if tried_with(families) != transformers.__version__:
        pytest.skip(f"the page is about transformers {tried_with(families)}, {transformers.__version__} is installed")
    command = [sys.executable, FOLDER / "families.py", "run", "--into", tmp_path / "found.json", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found, page = families.results(tmp_path / "found.json"), families.results(families.RESULTS)
    differing = {key: (found.get(key), row) for key, row in page.items() if found.get(key) != row}
    assert not differing, done.stdout
    assert done.returncode == 0, done.stdout


def test_what_only_picks_experts_is_found_by_gradients(families: Any) -> None:
    """The run over all models has an eye of its own for routers, which knows no names and no shapes."""
    model = tiny_model("afmoe")
    for name in fused_in(model):
        take_apart(model, name)
    assert families.only_routing(model) == {"model.layers.1.mlp.router.gate"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_not_what_its_weights_stand_for_fails(
    families: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = families.tried(families.Row("llama"), tmp_path / "right")
    assert (right.outcome, right.kind, right.whole) == ("works", "LlamaForCausalLM", False)
    product = CompressedLinear.forward
    monkeypatch.setattr(CompressedLinear, "forward", lambda layer, x: product(layer, x) * 1.001)
    wrong = families.tried(families.Row("llama"), tmp_path / "wrong")
    assert wrong.outcome == "fails"
    assert "slimlm.load: logits of up to" in wrong.words


def test_a_model_that_dies_or_hangs_is_a_row(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "child", lambda row, pipe: os._exit(1) if row.model_type == "dies" else time.sleep(60))
    monkeypatch.setattr(families, "SECONDS", 0.5)
    for name, words in (("dies", "the process died"), ("hangs", "it took more than 0.5 s")):
        running = families.Running.start(families.Row(name))
        while (row := running.result()) is None:
            time.sleep(0.05)
        assert (row.outcome, row.words) == ("fails", words)
        assert not running.process.is_alive()
