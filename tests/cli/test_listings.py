"""`methods`, `recipes` and `inspect`: lists, and one thing in full."""

import json
import tomllib
from pathlib import Path

import pytest

import slimlm
from slimlm.core import registry
from slimlm.recipe import open_recipe, shipped
from slimlm.recipes import DEFAULT_RECIPE
from slimlm.record import Record
from slimlm.report.speed import generation_speed_table
from slimlm.storage import checkpoint
from tests.conftest import Line

METHODS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_is_described_with_its_options(line: Line, kind: str, name: str) -> None:
    status, out, _ = line("methods", name)
    assert status == 0 and f'{kind} = "{name}"' in out
    described = json.loads(line("methods", name, "--json")[1])["methods"]
    assert [(m["kind"], m["name"]) for m in described] == [(kind, name)]
    assert all(f"\n{option} " in out for option in described[0]["options"])


def test_an_unknown_method_is_refused_with_a_similar_one_or_as_a_recipe(line: Line) -> None:
    assert "did you mean 'gptq'?" in line.refused("methods", "gtpq")
    assert "slimlm recipes best shows it" in line.refused("methods", "best")


def test_recipes_are_listed_with_the_default_and_shown_as_files(line: Line, tmp_path: Path) -> None:
    listed = line("recipes")[1]
    assert all(f"\n{name} " in listed for name in shipped())
    [default] = [row for row in listed.splitlines() if "(the default)" in row]
    assert default.startswith(f"{DEFAULT_RECIPE} ")
    for name in shipped():
        text = line("recipes", name)[1]
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
        assert tomllib.loads(text)["name"] == name
        assert open_recipe(str(tmp_path / f"{name}.toml")) == open_recipe(name)
        assert json.loads(line("recipes", name, "--json")[1]) == json.loads(json.dumps(open_recipe(name).to_dict()))
    assert "did you mean 'best'?" in line.refused("recipes", "bst")


def test_inspect_gives_bits_per_weight_of_each_layer_and_checksums_when_asked(line: Line, packed: Path) -> None:
    found = json.loads(line("inspect", packed, "--json")[1])
    record = Record.from_dict(checkpoint.read_record(packed))
    assert [row["bits_per_weight"] for row in found["layers"]] == [own.bits_per_weight for own in record.layers]
    assert all("tensors" not in file and file["sha256"] for file in found["files"].values())
    assert "--checksums adds to what --json prints" in line.refused("inspect", packed, "--checksums")
    more = json.loads(line("inspect", packed, "--json", "--checksums")[1])
    assert more["files"] == checkpoint.read_record(packed)["files"]


@pytest.mark.parametrize("verb", [("inspect",), ("verify",)])
def test_no_line_of_a_table_ends_in_spaces(line: Line, packed: Path, verb: tuple[str, ...]) -> None:
    rows = line(*verb, packed)[1].splitlines()
    assert len(rows) > 3 and rows == [row.rstrip() for row in rows]


def test_a_printed_result_is_a_few_lines(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    result = slimlm.compress(llama_folder, tmp_path / "o", recipe="absmax", data=str(text_file), samples=2, length=16)
    shown = str(result)
    assert len(shown.splitlines()) == 6 and len(shown) < 600
    assert str(tmp_path / "o") in shown and f"{result.record.bits_per_weight:.3f}" in shown
    assert result.record.perplexity is not None and f"{result.record.perplexity.compressed:.3f}" in shown
    assert result.record.divergence is not None and f"{result.record.divergence.mean.value:.4f} nats" in shown


def test_whole_models_are_compared_with_float32_at_the_same_batch() -> None:
    common = {"prompt_tokens_per_second": 1.0, "new_tokens_per_second_bound": 1.0, "bytes_per_step": 1, "decode_path": "p"}
    speeds = {("slimlm", 1): 30.0, ("slimlm", 4): 50.0, ("torch float32", 1): 10.0, ("torch float32", 4): 40.0}
    rows = [
        {"contender": own, "batch": batch, "new_tokens_per_second": rate, **common} for (own, batch), rate in speeds.items()
    ]
    ratios = list(generation_speed_table({"generation": rows}).columns[4].cells)
    assert ratios == ["3.00", "1.25", "1.00", "1.00"]
    assert list(generation_speed_table({"generation": rows[:1]}).columns[4].cells) == ["-"]


def test_completion_can_be_installed(line: Line) -> None:
    assert "--install-completion" in line("--help")[1]
