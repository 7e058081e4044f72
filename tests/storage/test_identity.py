"""What differs between two runs is named, and a weight that changes anywhere is seen."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimlm.core.errors import CheckpointError, NumericsError
from slimlm.storage.identity import OUTSIDE, differences, files_identity, weights_identity
from slimlm.storage.journal import Journal


def test_a_difference_is_said_with_its_place_and_both_values() -> None:
    before = {"recipe": {"name": "slim", "steps": [{"bits": 4}, {"rank": 0.1}]}, "gone": 1}
    now = {"recipe": {"name": "slim", "steps": [{"bits": 3}, {"rank": 0.1}]}, "new": "x" * 100}
    found = list(differences(before, now))
    assert found[:2] == ["recipe.steps[0].bits was 4 and is 3", "gone was 1 and is null"]
    assert found[2].startswith('new was null and is "xxx') and found[2].endswith("...")
    assert list(differences(before, before)) == []


def test_each_block_has_a_checksum_of_its_own_and_one_value_changes_it() -> None:
    weights = {f"layers.{i}.weight": torch.full((4,), float(i)) for i in range(11)} | {"head": torch.ones(2)}
    blocks = [f"layers.{i}" for i in range(11)]
    released: list[int] = []
    before = weights_identity(weights, blocks, lambda tensors: released.extend(map(id, tensors)))
    assert before.keys() == {*blocks, OUTSIDE} and released == [id(tensor) for tensor in weights.values()]
    weights["layers.1.weight"] = weights["layers.1.weight"].clone()
    weights["layers.1.weight"][-1] += 1
    after = weights_identity(weights, blocks, lambda _: None)
    assert [name for name in before if before[name] != after[name]] == ["layers.1"]


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(NumericsError, match=r"layers\.0\.weight"):
        weights_identity({"layers.0.weight": torch.tensor([1.0, float("nan")])}, ["layers.0"], lambda _: None)


def test_files_that_hold_other_values_or_other_names_are_other_files(tmp_path: Path) -> None:
    def identity(name: str, value: float) -> str:
        save_file({name: torch.full((8,), value)}, tmp_path / "model.safetensors")
        return files_identity([tmp_path / "model.safetensors"])["model.safetensors"]

    assert identity("a", 1.0) == identity("a", 1.0)
    assert len({identity("a", 1.0), identity("a", 2.0), identity("b", 1.0)}) == 3


def test_another_run_is_refused_in_python_s_own_words(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.match_identity({"recipe": "slim"})
    journal.match_identity({"recipe": "slim"})
    with pytest.raises(CheckpointError, match=r'recipe was "slim" and is "best-24".*pass `restart`'):
        journal.match_identity({"recipe": "best-24"})
    journal.match_weights({"layers.0": "1"})
    with pytest.raises(CheckpointError, match=r"layers\.0 changed since.*pass `restart`"):
        journal.match_weights({"layers.0": "2"})
