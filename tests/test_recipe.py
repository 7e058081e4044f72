"""Recipes: shipped ones work, written ones come back, and whatever makes no sense is refused with a message."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from slimlm.core import registry
from slimlm.core.errors import RecipeError
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.cross_covariance import CrossCovariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.output_residual_covariance import OutputResidualCovariance
from slimlm.core.statistics.peak_mean_abs import PeakMeanAbs
from slimlm.methods.compensate.slim_lora import SlimLora
from slimlm.methods.joint.alternation import Alternation
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.slim_quant import SlimQuant
from slimlm.recipe import Recipe, ReconstructionOptions, open_recipe, recipe_from_dict, shipped, to_toml


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
        {"quantize": "slim_quant", "bits": 3, "group_size": "per-channel"},
        {"prune": "wanda", "pattern": 0.6},
        {"compensate": "slim_lora", "rank": 0.05, "bits": 8, "shift": True},
        ignore=["*.down_proj"],
        name="own",
    )
    assert [named.step for named in first.steps] == [
        SlimQuant(3, "per-channel"),
        Wanda(0.6),
        SlimLora(0.05, 8, shift=True),
    ]
    assert recipe_from_dict(first.to_dict(), source="again") == first


def test_a_file_says_the_same_as_the_data(tmp_path: Path) -> None:
    text = 'name = "own"\n[[steps]]\nprune = "wanda"\npattern = "1:4"\n[[steps]]\nquantize = "slim_quant"\ngroup_size = 64\n'
    opened = open_recipe(written(tmp_path, text))
    assert opened.steps == recipe({"prune": "wanda", "pattern": "1:4"}, {"quantize": "slim_quant", "group_size": 64}).steps
    assert opened.name == "own"


def test_the_order_of_the_steps_is_the_order_of_the_list() -> None:
    steps = [{"prune": "magnitude"}, {"compensate": "svd"}, {"quantize": "absmax"}]
    assert [named.method for named in recipe(*steps).steps] == ["magnitude", "svd", "absmax"]
    assert [named.method for named in recipe(*steps[::-1]).steps] == ["absmax", "svd", "magnitude"]


def test_the_needs_are_those_of_all_steps_together() -> None:
    assert recipe({"quantize": "absmax"}).needs == frozenset()
    both = recipe({"prune": "wanda"}, {"compensate": "l2qer"})
    assert both.needs == frozenset({MeanSquare, PeakMeanAbs})


def test_layers_are_left_by_pattern_on_their_full_name() -> None:
    some = recipe({"quantize": "absmax"}, ignore=["*.down_proj", "model.layers.0.*"])
    assert some.ignores("model.layers.3.mlp.down_proj")
    assert some.ignores("model.layers.0.self_attn.q_proj")
    assert not some.ignores("model.layers.3.mlp.up_proj")
    assert not recipe({"quantize": "absmax"}).ignores("model.layers.0.self_attn.q_proj")


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
        ({"quantize": "absmax", "bitz": 4}, ["bitz", "bits", "group_size"]),
        ({"quantize": "absmax", "needs": 1}, ["needs", "bits", "group_size"]),
        ({"quantize": "absmax", "bits": 1}, ["bits = 1", "2 to 8"]),
        ({"quantize": "absmax", "bits": 9}, ["bits = 9", "2 to 8"]),
        ({"quantize": "absmax", "bits": 4.5}, ["bits", "4.5"]),
        ({"quantize": "absmax", "bits": "many"}, ["bits", "many"]),
        ({"quantize": "absmax", "group_size": "column"}, ["group_size", "column"]),
        ({"quantize": "absmax", "group_size": 0}, ["group_size = 0", "per-channel", "per-tensor"]),
        ({"quantize": "slim_quant", "search": "fast"}, ["search", "fast", "paper"]),
        ({"quantize": "slim_quant", "search": "paper", "group_size": 64}, ["paper", "per-tensor", "64"]),
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
        ([{"prune": "wanda"}, {"quantize": "absmax"}, {"prune": "magnitude"}], ["at most once", "wanda and magnitude"]),
        ([{"joint": "alternation"}, {"prune": "wanda"}], ["at most once", "alternation and wanda"]),
        ([{"compensate": "svd"}, {"quantize": "absmax"}], ["first step fits an adapter"]),
    ],
)
def test_a_list_of_steps_that_makes_no_sense_is_refused(steps: list[Any], words: list[str]) -> None:
    said = refusal(*steps)
    assert "mine" in said
    assert all(word in said for word in words), said


def test_an_unknown_key_and_a_wrong_kind_of_ignore_are_refused() -> None:
    assert "'step'" in refusal({"quantize": "absmax"}, step=1)
    assert "ignore" in refusal({"quantize": "absmax"}, ignore="*.down_proj")


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


# Rules for some layers


def options_of(some: Recipe, layer: str) -> list[Any]:
    return [named.step for named in some.steps_for(layer)]


def test_a_rule_changes_the_layers_it_names_and_no_others() -> None:
    some = recipe({"quantize": "slim_quant"}, {"prune": "wanda"}, rules=[{"layers": ["*.mlp.*", "*.o_proj"], "bits": 3}])
    changed = [SlimQuant(3), Wanda()]
    assert options_of(some, "model.layers.0.mlp.up_proj") == changed
    assert options_of(some, "model.layers.7.self_attn.o_proj") == changed
    assert options_of(some, "model.layers.0.self_attn.q_proj") == [SlimQuant(4), Wanda()]


def test_a_rule_reaches_every_step_that_has_the_option_and_no_other_step() -> None:
    steps = {"quantize": "slim_quant", "group_size": 64}, {"prune": "wanda"}, {"compensate": "slim_lora"}
    some = recipe(*steps, rules=[{"layers": ["*"], "bits": 8, "pattern": "1:4"}])
    assert options_of(some, "a") == [SlimQuant(8, 64), Wanda("1:4"), SlimLora(bits=8)]


def test_of_two_rules_the_later_one_wins_and_what_it_does_not_say_stays() -> None:
    rules = [{"layers": ["*.mlp.*"], "bits": 3, "group_size": 64}, {"layers": ["*.0.*"], "bits": 8}]
    some = recipe({"quantize": "slim_quant"}, rules=rules)
    assert options_of(some, "model.0.mlp.up") == [SlimQuant(8, 64)]
    assert options_of(some, "model.1.mlp.up") == [SlimQuant(3, 64)]
    assert options_of(some, "model.0.attn.q") == [SlimQuant(8)]


def test_rules_and_the_other_keys_come_back_from_data_and_from_a_file(tmp_path: Path) -> None:
    first = recipe(
        {"joint": "alternation", "rank": "auto", "codebook": "fitted"},
        name="own",
        summary='with "quotes" and a \\ backslash',
        ignore=["*.lm"],
        rules=[{"layers": ["*.mlp.*"], "bits": 3, "pattern": ""}, {"layers": ["*.0.*"], "group_size": "per-channel"}],
        sequential=True,
        block_reconstruction={"passes": 3, "inputs": "asymmetric"},
    )
    assert first.sequential and first.block_reconstruction == ReconstructionOptions(3, inputs="asymmetric")
    assert recipe_from_dict(first.to_dict(), source="again") == first
    assert open_recipe(written(tmp_path, to_toml(first))) == first


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_written_to_a_file_says_the_same(tmp_path: Path, name: str) -> None:
    assert open_recipe(written(tmp_path, to_toml(open_recipe(name)))) == open_recipe(name)


def test_what_a_file_does_not_say_is_off() -> None:
    some = recipe({"quantize": "absmax"})
    assert (some.sequential, some.rules, some.block_reconstruction) == (False, (), None)
    assert recipe({"quantize": "absmax"}, block_reconstruction={}).block_reconstruction == ReconstructionOptions()


def test_a_layer_is_refused_by_the_options_that_its_rules_give_it() -> None:
    some = recipe(
        {"joint": "alternation"},
        rules=[
            {"layers": ["*.dense"], "pattern": ""},
            {"layers": ["*.half"], "pattern": 0.5},
            {"layers": ["*.thin"], "rank": 0.01},
        ],
    )
    said = some.refuses("a.fc1", (64, 770))
    assert said is not None and "2:4" in said and "770" in said
    assert some.refuses("a.dense", (64, 770)) is None
    assert some.refuses("a.half", (64, 770)) is None
    said = some.refuses("a.thin", (64, 768))
    assert said is not None and "rank = 0.01" in said and "at least 0.0156" in said


def test_the_needs_of_a_joint_solver_are_those_of_its_options() -> None:
    assert recipe({"joint": "alternation"}).needs == frozenset({Covariance, CrossCovariance, OutputResidualCovariance})
    assert recipe({"joint": "alternation", "asymmetric": 0.0}).needs == frozenset({Covariance})
    assert recipe({"prune": "sparsegpt"}, {"quantize": "gptq"}, {"compensate": "qera"}).needs == frozenset({Covariance})


def test_the_needs_are_also_those_that_a_rule_brings_in() -> None:
    some = recipe({"joint": "alternation", "asymmetric": 0.0}, rules=[{"layers": ["*.mlp.*"], "asymmetric": 0.1}])
    assert options_of(some, "a.mlp.up") == [Alternation(asymmetric=0.1)]
    assert some.needs == frozenset({Covariance, CrossCovariance, OutputResidualCovariance})


def test_a_joint_solver_without_a_pattern_leaves_the_pruning_to_a_pruner() -> None:
    some = recipe({"prune": "wanda"}, {"joint": "alternation", "pattern": ""})
    assert [named.method for named in some.steps] == ["wanda", "alternation"]


def test_a_rule_that_makes_a_second_step_prune_is_refused() -> None:
    steps = {"joint": "alternation", "pattern": ""}, {"prune": "wanda"}
    said = refusal(*steps, rules=[{"layers": ["a"], "bits": 3}, {"layers": ["b"], "pattern": "2:4"}])
    assert "mine, rule 2" in said and "at most once; alternation and wanda" in said


@pytest.mark.parametrize("first", [{"quantize": "slim_quant"}, {"quantize": "gptq"}, {"joint": "alternation", "pattern": ""}])
def test_a_pruner_that_moves_weights_is_refused_after_what_codes_them(first: dict[str, Any]) -> None:
    coder = next(iter(first.values()))
    for between in ([], [{"compensate": "qera"}]):
        said = refusal(first, *between, {"prune": "sparsegpt"})
        assert f"mine: sparsegpt changes weights that {coder} has quantized; put it before {coder}" in said
    if "joint" in first:
        assert "alternation replaces what sparsegpt did before it" in refusal({"prune": "sparsegpt"}, first)
    else:
        assert [named.method for named in recipe({"prune": "sparsegpt"}, first).steps] == ["sparsegpt", coder]
    assert [named.method for named in recipe(first, {"prune": "wanda"}).steps] == [coder, "wanda"]


def test_which_pruners_move_weights_is_known() -> None:
    moving = [name for name in registry.names("prune") if registry.find("prune", name)().moves_weights]
    assert moving == ["sparsegpt"]
    assert "'moves_weights'" in refusal({"prune": "sparsegpt", "moves_weights": False})  # no option


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, ["names its layers"]),
        ({"bits": 3}, ["names its layers", "*.down_proj"]),
        ({"layers": "*.mlp.*", "bits": 3}, ["names its layers"]),
        ({"layers": [], "bits": 3}, ["names its layers"]),
        ({"layers": [3], "bits": 3}, ["names its layers"]),
        ({"layers": ["*"], "bitz": 3}, ["'bitz'", "bits", "group_size", "damp"]),
        ({"layers": ["*"], "quantize": "absmax"}, ["quantize = 'absmax'", "quantize = 'gptq'"]),
        ({"layers": ["*"], "rank": "auto"}, ["no step has the option 'rank'"]),
        ({"layers": ["*"], "bits": 1}, ["gptq", "bits = 1", "2 to 8"]),
        ({"layers": ["*"], "bits": "many"}, ["gptq", "bits", "many"]),
        ({"layers": ["*"], "group_size": 0}, ["gptq", "group_size = 0"]),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_what_would(rule: Any, words: list[str]) -> None:
    said = refusal({"quantize": "gptq"}, rules=[{"layers": ["*"], "bits": 3}, rule])
    assert "rule 2" in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("rank", [0.1, "auto"])
def test_what_is_left_to_a_plan_is_for_all_layers(rank: float | str) -> None:
    step = {"joint": "alternation", "rank": rank}
    assert 'rank = "auto" is for all layers' in refusal(step, rules=[{"layers": ["*.up"], "rank": "auto"}])
    assert recipe(step, rules=[{"layers": ["*.up"], "codebook": "auto"}]).needs_plan == (rank == "auto")


@pytest.mark.parametrize("rules", [{"layers": ["*"], "bits": 3}, "absmax", 3, None, [{"layers": ["*"], "bits": 3}, "absmax"]])
def test_rules_that_are_no_list_of_tables_are_refused(rules: Any) -> None:
    assert "mine: rules are [[rules]] tables, each with layers and options" in refusal({"quantize": "gptq"}, rules=rules)


@pytest.mark.parametrize("sequential", [1, "yes", [True]])
def test_sequential_is_true_or_false(sequential: Any) -> None:
    assert "sequential" in refusal({"quantize": "absmax"}, sequential=sequential)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"pass": 3}, ["'pass'", "passes", "rate"]),
        ({"passes": 0}, ["passes = 0", "at least one"]),
        ({"passes": "many"}, ["passes", "many"]),
        ({"rate": 2.0}, ["rate = 2"]),
        ({"codes": "free"}, ["codes", "free", "ste"]),
        ({"inputs": "none"}, ["inputs", "none", "asymmetric"]),
    ],
)
def test_a_block_reconstruction_that_makes_no_sense_is_refused(table: dict[str, Any], words: list[str]) -> None:
    said = refusal({"quantize": "absmax"}, block_reconstruction=table)
    assert "mine, block_reconstruction" in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("table", [3, "yes", True, [], None])
def test_a_block_reconstruction_that_is_no_table_is_refused(table: Any) -> None:
    said = refusal({"quantize": "absmax"}, block_reconstruction=table)
    assert f"mine: block_reconstruction = {table!r}; give a [block_reconstruction] table" in said


def test_a_rule_that_names_its_step_leaves_the_others_alone() -> None:
    rule = {"layers": ["*.up"], "quantize": "slim_quant", "bits": 3}
    some = recipe({"quantize": "slim_quant"}, {"compensate": "slim_lora"}, rules=[rule])
    quantizer, adapter = options_of(some, "a.up")
    assert (quantizer.bits, adapter.bits) == (3, 4)
    assert recipe_from_dict(tomllib.loads(to_toml(some)), source="again") == some


@pytest.mark.parametrize("first", [{"quantize": "gptq"}, {"joint": "alternation"}, {"joint": "jsq"}])
def test_a_joint_solver_after_what_it_would_undo_is_refused(first: dict[str, Any]) -> None:
    assert "replaces what" in refusal(first, {"joint": "alternation", "pattern": ""})
