"""Plans on a tiny model: the budget holds, the model comes out unharmed, the recipe says it all, refusals with a message."""

import dataclasses
import json
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import slimlm
from slimlm import pipeline
from slimlm.calibration.calls import observe
from slimlm.calibration.capture import enter
from slimlm.cli.app import app
from slimlm.core.errors import DataError, RecipeError
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.cross_covariance import CrossCovariance
from slimlm.evaluation.stored_model import StoredModel
from slimlm.events import quiet
from slimlm.methods.quantize.gptq import Gptq
from slimlm.models.structure import blocks_of
from slimlm.planner.options import Budget, Option
from slimlm.planner.plan import make_plan
from slimlm.planner.trials import Judged, Original
from slimlm.recipe import NamedStep, open_recipe, recipe_from_dict, to_toml
from tests.conftest import random_model

CPU = torch.device("cpu")
WINDOWS = torch.randint(256, (12, 32), generator=torch.Generator().manual_seed(0))


FIRST = ["model.layers.0.*"]
"""Of two blocks one is enough to plan; the other goes along as it is."""


def quick_recipe(ignore: list[str] | None = None, **options: object) -> slimlm.Recipe:
    step = {"joint": "alternation", "rounds": 1, "descent_rounds": 0, "group_size": 16, **options}
    return recipe_from_dict({"name": "quick", "sequential": True, "ignore": ignore or [], "steps": [step]}, source="test")


def option(bits: int, group_size: int, pattern: str, rank: float) -> Option:
    values = {"bits": bits, "group_size": group_size, "pattern": pattern, "rank": rank}
    return Option(quick_recipe(**values).steps, tuple(values.items()))


OPTIONS = [option(2, 32, "", 0.0), option(4, 32, "", 0.0), option(6, 32, "", 0.0), option(4, 16, "2:4", 0.1)]
BUDGETS = [3.0, 4.7, 5.9]


def original_of(model: PreTrainedModel) -> Original:
    """A model in memory as one that runs from its stored tensors."""
    stored = StoredModel(model, dict(model.state_dict()), lambda tensors: list(tensors))
    calls = observe(model, blocks_of(model)).calls
    return Original(stored, lambda samples: enter(model, blocks_of(model), samples), calls.forms, CPU)


def planned(bits: float, model: PreTrainedModel, options: list[Option], ignore: list[str] | None = None) -> pipeline.Plan:
    budget = Budget(tuple(options), bits, "size")
    return make_plan(original_of(model), quick_recipe(ignore), WINDOWS, budget=budget, progress=quiet)


@cache
def plan_of(bits: float) -> pipeline.Plan:
    return planned(bits, random_model("llama"), OPTIONS, FIRST)


@pytest.mark.parametrize("bits", BUDGETS)
def test_the_plan_keeps_its_budget_and_uses_most_of_it(bits: float) -> None:
    found = plan_of(bits)
    assert found.bits_per_weight <= bits
    assert found.bits_per_weight > bits - 1  # the options are 2 bits apart, and some of the 14 layers can always move up


def test_the_model_comes_out_as_it_went_in() -> None:
    model = random_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = planned(4.0, model, OPTIONS[::3])
    assert len(found.choices) == 8  # both blocks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_that_share_an_input_get_one_choice() -> None:
    found = plan_of(BUDGETS[1])
    names = [[layer.rpartition(".")[2] for layer in choice.layers] for choice in found.choices]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_more_bits_for_a_group_lose_less() -> None:
    for choice in plan_of(BUDGETS[1]).choices:
        two, four, six, _ = choice.losses
        assert two > four > six > 0


@pytest.mark.parametrize("bits", BUDGETS)
def test_the_choice_is_never_worse_than_the_single_option_where_both_were_checked(bits: float) -> None:
    found = plan_of(bits)
    assert found.uniform is not None
    assert found.fallback == (found.uniform_loss < found.planned_loss)
    if found.fallback:
        assert {choice.chosen for choice in found.choices} == {found.uniform}


def test_too_few_windows_are_refused() -> None:
    model = random_model("llama")
    with pytest.raises(DataError, match="at least 3"):
        budget = Budget((OPTIONS[1],), 5.0, "size")
        make_plan(original_of(model), quick_recipe(), WINDOWS[:2], budget=budget, progress=quiet)


def test_a_planned_model_has_the_bits_that_the_plan_says(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"data": str(text_file), "samples": 24, "length": 48}
    result = slimlm.compress(llama_folder, tmp_path / "out", recipe=quick_recipe(FIRST, codebook="none"), bits=4.8, **options)
    record = result.record
    assert record.plan is not None
    # Room for tables of levels is planned and not used here.
    assert record.plan["bits_per_weight"] - 0.2 < record.bits_per_weight <= record.plan["bits_per_weight"]
    assert record.bits_per_weight <= 4.8
    kinds = {layer.parts for layer in record.layers}
    assert len(kinds) > 1 or record.plan["fallback"]
    assert json.loads((tmp_path / "out" / "slimlm.json").read_text())["plan"]["asked_bits"] == 4.8


def test_a_quantizer_is_planned_as_well(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(open_recipe("gptq"), ignore=("*.layers.1.*",))
    options = {"data": str(text_file), "samples": 24, "length": 48}
    record = slimlm.compress(llama_folder, tmp_path / "out", recipe=recipe, bits=4.0, **options).record
    assert record.plan is not None and record.bits_per_weight == record.plan["bits_per_weight"] <= 4.0
    assert record.bits_per_weight > 3.0
    chosen = [record.plan["options"][choice["chosen"]] for choice in record.plan["choices"]]
    assert all({field.name for field in dataclasses.fields(Gptq)} | {"description"} == set(option) for option in chosen)
    for choice, option in zip(record.plan["choices"], chosen, strict=True):
        parts = {layer.parts for layer in record.layers if layer.name in choice["layers"]}
        assert parts == {f"{option['bits']}-bit (groups of {option['group_size']})"}


@dataclasses.dataclass(frozen=True)
class _Comparing(Gptq):
    """A step that cannot do without the original model, even for a trial."""

    needs = frozenset({Covariance, CrossCovariance})


def test_a_step_that_compares_even_in_a_trial_is_refused() -> None:
    model, recipe = random_model("llama"), quick_recipe()
    steps = (NamedStep("quantize", "gptq", _Comparing()),)
    budget = Budget((Option(steps, (("bits", 4),)),), 5.0, "size")
    with pytest.raises(RecipeError, match="CrossCovariance even for a trial"):
        make_plan(original_of(model), recipe, WINDOWS, budget=budget, progress=quiet)


def test_rank_auto_spends_the_bits_of_rank_a_tenth(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.methods.joint.alternation._AUTO_RANKS", (0.0, 0.05, 0.1, 0.2))  # half, for half the time
    options = {"data": str(text_file), "samples": 24, "length": 48}
    fixed = slimlm.compress(llama_folder, tmp_path / "fixed", recipe=quick_recipe(FIRST, codebook="none"), **options)
    recipe = quick_recipe(FIRST, codebook="none", rank="auto")
    auto = slimlm.compress(llama_folder, tmp_path / "auto", recipe=recipe, **options)
    assert auto.record.bits_per_weight <= fixed.record.bits_per_weight
    assert auto.record.bits_per_weight > 0.9 * fixed.record.bits_per_weight
    assert {layer.sparsity for layer in auto.record.layers} == {0.5}
    assert auto.record.plan is not None


def test_the_saved_recipe_carries_the_plan_out(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "quick.toml"
    recipe.write_text(to_toml(quick_recipe(FIRST, codebook="none")))
    where = ["--data", str(text_file), "--samples", "24", "--length", "48"]
    saved = tmp_path / "planned.toml"
    asked = ["--recipe", str(recipe), "--bits", "4.8", "--embedding-bits", "8"]
    done = CliRunner().invoke(app, ["plan", str(llama_folder), *asked, "--save", str(saved), *where])
    assert done.exit_code == 0, done.output
    assert "down_proj" in done.output and "groups given it" in done.output
    planned = open_recipe(str(saved))
    assert planned.embedding_bits == 8 and "embedding and lm_head, which are stored in 8 bits" in done.output
    assert tomllib.loads(saved.read_text())["rules"] == [rule.to_dict() for rule in planned.rules]
    result = slimlm.compress(llama_folder, tmp_path / "out", recipe=planned, data=str(text_file), samples=24, length=48)
    assert result.record.bits_per_weight <= 4.8
    assert [end.parts for end in result.record.embeddings] == 2 * ["8-bit (groups of 32)"]
    again = CliRunner().invoke(app, ["plan", str(llama_folder), "--bits", "4.8", "--save", str(saved), *where])
    assert isinstance(again.exception, RecipeError) and "exists already" in str(again.exception)


def test_the_json_of_a_plan_is_json(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.methods.joint.alternation._AUTO_RANKS", (0.0, 0.025, 0.2))
    recipe = tmp_path / "quick.toml"
    recipe.write_text(to_toml(quick_recipe(FIRST, codebook="none", rank="auto")))
    line = ["plan", str(llama_folder), "--recipe", str(recipe), "--json", "--data", str(text_file)]
    done = CliRunner().invoke(app, [*line, "--samples", "24", "--length", "48"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert 0 < data["bits_per_weight"] <= data["asked_bits"]
    # A rank of 0.025 is none for the 24 outputs of k and v: JSON has no infinity for what that loses.
    assert [None in choice["losses"] for choice in data["choices"]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "slim", "bits": 3.5}, "quantize slim_quant, prune wanda.*gptq, alternation"),
        ({"bits": 1.6}, "smallest"),
        ({"bits": 0.5}, "from 1.5 to 8.5"),
        ({}, "nothing to plan"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: dict[str, object], said: str, llama_folder: Path, text_file: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        pipeline.plan(llama_folder, data=str(text_file), samples=24, length=48, **arguments)  # type: ignore[arg-type]


def test_rules_and_a_budget_contradict_each_other(llama_folder: Path, text_file: Path) -> None:
    data = quick_recipe().to_dict() | {"rules": [{"layers": ["*.down_proj"], "bits": 8}]}
    with pytest.raises(RecipeError, match="rules"):
        pipeline.plan(llama_folder, recipe=recipe_from_dict(data, source="test"), bits=4.0, data=str(text_file))


def test_an_objective_without_a_budget_is_refused(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`bits`"):
        slimlm.compress(llama_folder, tmp_path / "out", recipe="absmax", objective="speed", data=str(text_file))


def test_a_planned_recipe_of_automatic_ranks_plans_no_more(llama_folder: Path, text_file: Path) -> None:
    arguments = {"recipe": quick_recipe(rank="auto"), "data": str(text_file), "samples": 24, "length": 48}
    _, planned = pipeline.plan(llama_folder, **arguments)  # type: ignore[arg-type]
    assert not planned.needs_plan


def test_the_measured_losses_are_those_of_the_model_with_one_group_changed() -> None:
    """The law: what goes on block by block is the model's own forward pass with other weights in one block."""
    model, windows = random_model("llama"), WINDOWS[:2]
    original = original_of(model)
    judged = Judged.of(original, windows)
    changes = [
        {"mlp.down_proj": torch.randn(model.get_parameter(f"model.layers.{i}.mlp.down_proj.weight").shape)} for i in (0, 1)
    ]
    for here, change in zip(original.walk(WINDOWS[2:], frozenset({Covariance}), lambda _: False), changes, strict=True):
        judged.change(here, [change])
    found = judged.losses()
    with torch.no_grad():
        expected = model(windows).logits.log_softmax(-1)
        for i, (change, loss) in enumerate(zip(changes, found, strict=True)):
            weight = model.get_parameter(f"model.layers.{i}.mlp.down_proj.weight")
            before = weight.clone()
            weight.copy_(change["mlp.down_proj"])
            logs = model(windows).logits.log_softmax(-1)
            weight.copy_(before)
            assert loss == pytest.approx(float((expected.exp() * (expected - logs)).sum(-1).mean()), rel=1e-4)
    assert min(found) > 0


def test_only_one_loss_of_a_group_is_measured_and_the_others_are_as_their_errors() -> None:
    for choice in plan_of(BUDGETS[1]).choices:
        assert choice.losses[choice.measured] > 0
        for error, loss in zip(choice.errors, choice.losses, strict=True):
            assert loss / choice.losses[choice.measured] == pytest.approx(error / choice.errors[choice.measured])


def test_a_model_that_overflows_under_an_option_has_an_infinite_loss_and_not_none() -> None:
    model = random_model("llama")
    original = original_of(model)
    judged = Judged.of(original, WINDOWS[:2])
    shape = model.get_parameter("model.layers.0.mlp.down_proj.weight").shape
    for here in original.walk(WINDOWS[2:], frozenset({Covariance}), lambda _: False):
        judged.change(here, [{}, {"mlp.down_proj": torch.full(shape, float("nan"))}] if here.name.endswith("0") else [])
    same, overflown = judged.losses()
    assert same < 1e-9
    assert overflown == float("inf")
