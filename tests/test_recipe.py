"""Recipes: shipped ones work, written ones come back, and whatever makes no sense is refused in words."""

from pathlib import Path
from typing import Any

import pytest

from slimlm.core import registry
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Need
from slimlm.methods.compensate.slim_lora import SlimLora
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.slim_quant import SlimQuant
from slimlm.recipe import Recipe, open_recipe, recipe_from_dict, shipped


def recipe(*steps: dict[str, Any], **keys: Any) -> Recipe:
    return recipe_from_dict({"steps": list(steps), **keys}, source="mine")


def refusal(*steps: Any, **keys: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(*steps, **keys)
    return str(caught.value)


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_comes_back_from_its_own_data(name: str) -> None:
    opened = open_recipe(name)
    assert opened.name == name
    assert opened.summary and "\n" not in opened.summary
    assert recipe_from_dict(opened.to_dict(), source="again") == opened


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_method_comes_back_from_data_with_its_defaults(kind: str) -> None:
    for name in registry.names(kind):
        before = [{"quantize": "absmax"}] if kind == "compensate" else []
        first = recipe(*before, {kind: name})
        assert first.steps[-1].step == registry.find(kind, name)()
        assert recipe_from_dict(first.to_dict(), source="again").steps == first.steps


def test_options_that_differ_from_the_defaults_come_back() -> None:
    first = recipe(
        {"quantize": "slim_quant", "bits": 3, "group": "row"},
        {"prune": "wanda", "pattern": 0.6},
        {"compensate": "slim_lora", "rank": 0.05, "bits": 8, "shift": True},
        leave=["*.down_proj"],
        name="own",
    )
    assert [named.step for named in first.steps] == [
        SlimQuant(3, "row"),
        Wanda(0.6),
        SlimLora(0.05, 8, shift=True),
    ]
    assert recipe_from_dict(first.to_dict(), source="again") == first


def test_a_file_says_the_same_as_the_data(tmp_path: Path) -> None:
    text = 'name = "own"\n[[steps]]\nprune = "wanda"\npattern = "1:4"\n[[steps]]\nquantize = "slim_quant"\ngroup = 64\n'
    opened = open_recipe(written(tmp_path, text))
    assert opened.steps == recipe({"prune": "wanda", "pattern": "1:4"}, {"quantize": "slim_quant", "group": 64}).steps
    assert opened.name == "own"


def test_the_order_of_the_steps_is_the_order_of_the_list() -> None:
    steps = [{"prune": "magnitude"}, {"compensate": "svd"}, {"quantize": "absmax"}]
    assert [named.method for named in recipe(*steps).steps] == ["magnitude", "svd", "absmax"]
    assert [named.method for named in recipe(*steps[::-1]).steps] == ["absmax", "svd", "magnitude"]


def test_the_needs_are_those_of_all_steps_together() -> None:
    assert recipe({"quantize": "absmax"}).needs == Need.NOTHING
    both = recipe({"prune": "wanda"}, {"compensate": "l2qer"})
    assert both.needs == Need.MEAN_SQUARE | Need.PEAK_MEAN_ABS


def test_layers_are_left_by_pattern_on_their_full_name() -> None:
    some = recipe({"quantize": "absmax"}, leave=["*.down_proj", "model.layers.0.*"])
    assert some.leaves("model.layers.3.mlp.down_proj")
    assert some.leaves("model.layers.0.self_attn.q_proj")
    assert not some.leaves("model.layers.3.mlp.up_proj")
    assert not recipe({"quantize": "absmax"}).leaves("model.layers.0.self_attn.q_proj")


def test_a_width_that_the_pattern_does_not_divide_is_refused_by_name() -> None:
    some = recipe({"quantize": "absmax"}, {"prune": "wanda"})
    said = some.refuses("model.layers.0.fc1", (64, 770))
    assert said is not None and "fc1" in said and "770" in said
    assert some.refuses("model.layers.0.fc1", (64, 768)) is None


@pytest.mark.parametrize(
    ("step", "near"),
    [
        ({"quantize": "slim_quan"}, "slim_quant"),
        ({"prune": "wander"}, "wanda"),
        ({"compensate": "slim_lore"}, "slim_lora"),
    ],
)
def test_a_name_that_is_nearly_right_gets_the_right_one(step: dict[str, Any], near: str) -> None:
    said = refusal({"quantize": "absmax"}, step)
    assert f"did you mean '{near}'?" in said
    assert "step 2" in said


def test_a_name_that_is_like_none_gets_all_of_them() -> None:
    said = refusal({"prune": "zzzz"})
    assert all(name in said for name in registry.names("prune"))


def test_a_method_of_another_kind_is_not_taken() -> None:
    assert "no quantizer is called 'wanda'" in refusal({"quantize": "wanda"})


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"quantize": "absmax", "bitz": 4}, ["bitz", "bits", "group"]),
        ({"quantize": "absmax", "needs": 1}, ["needs", "bits", "group"]),
        ({"quantize": "absmax", "bits": 1}, ["bits = 1", "2 to 8"]),
        ({"quantize": "absmax", "bits": 9}, ["bits = 9", "2 to 8"]),
        ({"quantize": "absmax", "bits": 4.5}, ["bits", "4.5"]),
        ({"quantize": "absmax", "bits": "many"}, ["bits", "many"]),
        ({"quantize": "absmax", "group": "column"}, ["group", "column"]),
        ({"quantize": "absmax", "group": 0}, ["group = 0", "row", "tensor"]),
        ({"quantize": "slim_quant", "search": "fast"}, ["search", "fast", "paper"]),
        ({"quantize": "slim_quant", "search": "paper", "group": 64}, ["paper", "tensor", "64"]),
        ({"prune": "wanda", "pattern": "4:2"}, ["4:2", "2:4"]),
        ({"prune": "wanda", "pattern": "half"}, ["half", "2:4"]),
        ({"prune": "wanda", "pattern": 1.0}, ["1.0", "2:4"]),
        ({"compensate": "svd", "rank": 2}, ["rank", "0 to 1"]),
        ({"compensate": "svd", "bits": 5}, ["bits = 5", "4, 8 or 16"]),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_with_what_would(step: dict[str, Any], words: list[str]) -> None:
    said = refusal(step)
    assert "step 1" in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], ["at least one"]),
        ([{}], ["quantize", "prune", "compensate", "nothing"]),
        ([{"bits": 4}], ["quantize", "prune", "compensate", "bits"]),
        ([{"quantize": "absmax", "prune": "wanda"}], ["exactly one"]),
        (["absmax"], ["[[steps]]"]),
        ([{"prune": "wanda"}, {"quantize": "absmax"}, {"prune": "magnitude"}], ["at most once", "2"]),
    ],
)
def test_a_list_of_steps_that_makes_no_sense_is_refused(steps: list[Any], words: list[str]) -> None:
    said = refusal(*steps)
    assert "mine" in said
    assert all(word in said for word in words), said


def test_an_unknown_key_and_a_wrong_kind_of_leave_are_refused() -> None:
    assert "'step'" in refusal({"quantize": "absmax"}, step=1)
    assert "leave" in refusal({"quantize": "absmax"}, leave="*.down_proj")


@pytest.mark.parametrize("text", ["steps = 3", "", 'name = "x"'])
def test_a_file_without_steps_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="at least one"):
        open_recipe(written(tmp_path, text))


@pytest.mark.parametrize("text", ["[[steps]\n", "a =", b"\xff\xfe\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(RecipeError, match=r"mine\.toml is not TOML"):
        open_recipe(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe file at .*absent\.toml"):
        open_recipe(str(tmp_path / "absent.toml"))


def test_an_unknown_recipe_gets_the_nearest_or_all() -> None:
    with pytest.raises(RecipeError, match="did you mean 'slim-paper'"):
        open_recipe("slim-papre")
    with pytest.raises(RecipeError) as caught:
        open_recipe("zzzz")
    assert all(name in str(caught.value) for name in shipped())
