"""What a run is asked for is one object, and the public functions take exactly its fields."""

import dataclasses
import importlib.util
import typing
from pathlib import Path
from typing import Any

import pytest

import slimlm
from slimlm.core.errors import DataError, RecipeError, SlimlmError
from slimlm.data.documents import name_of
from slimlm.run.config import RunConfig, RunOptions, pick_device


def test_the_options_are_the_fields_of_the_configuration() -> None:
    fields = typing.get_type_hints(RunConfig)
    options = typing.get_type_hints(RunOptions)
    assert {"model", "out"} == fields.keys() - options.keys() and options.keys() <= fields.keys()
    assert options.keys() <= {field.name for field in dataclasses.fields(RunConfig) if field.default is not dataclasses.MISSING}


@pytest.mark.parametrize("function", [slimlm.compress, slimlm.plan, slimlm.estimate])
def test_an_option_that_is_none_is_refused_by_its_name(function: Any, tmp_path: Path) -> None:
    arguments = (tmp_path, tmp_path / "o") if function is slimlm.compress else (tmp_path,)
    with pytest.raises(TypeError, match="sample_count"):
        function(*arguments, sample_count=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", slimlm.__all__)
def test_a_public_name_is_there_and_hides_no_module(name: str) -> None:
    assert hasattr(slimlm, name)
    assert importlib.util.find_spec(f"slimlm.{name}") is None


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"samples": 0}, DataError, "samples = 0"),
        ({"length": 1}, DataError, "length = 1"),
        ({"seed": 2**64}, DataError, "seed="),
        ({"recipe": "no such"}, RecipeError, "no such"),
        ({"embedding_bits": 3}, RecipeError, "embedding_bits = 3"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_asked_for(options: Any, error: type[SlimlmError], said: str) -> None:
    with pytest.raises(error, match=said):
        RunConfig(model="m", **options)


def test_an_objective_needs_a_budget_and_a_budget_a_recipe_that_can_be_planned() -> None:
    assert RunConfig(model="m", recipe="slim").budget() is None
    with pytest.raises(RecipeError, match="`objective` speed"):
        RunConfig(model="m", recipe="slim", objective="speed").budget()
    with pytest.raises(RecipeError, match="alternation"):
        RunConfig(model="m", recipe="slim", bits=4.0).budget()
    found = RunConfig(model="m", bits=4.0).budget()
    assert found is not None and found.bits == 4.0


def test_names_are_recorded_without_their_folders(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    assert name_of(str(tmp_path / "text.txt")) == "text.txt"
    assert name_of("allenai/c4:en") == "allenai/c4:en"


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "gpu"])
def test_another_device_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(SlimlmError, match=f'`device="{name}"`: give "auto", "cpu", "cuda" or "cuda:N"'):
        pick_device(name)
