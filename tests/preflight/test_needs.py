"""What a run will store follows from shapes alone, and equals what it stores."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma3Config

import slimlm
from slimlm.core.parts.codebook import Codebook, codebook_bits
from slimlm.core.parts.pruned import Pruned
from slimlm.core.statistics.base import Sizes
from slimlm.models.embeddings import embeddings_of
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.models.structure import blocks_of, context_length, text_config, vocabulary_size
from slimlm.pipeline import estimate
from slimlm.planner import forms
from slimlm.planner.forms import brief, drawn_layer, fitting, form_of, resolved
from slimlm.preflight.estimate import times_of
from slimlm.preflight.needs import RunNeeds
from slimlm.preflight.rates import Rates, StepCost
from slimlm.preflight.times import planning_seconds, seconds_of
from slimlm.recipe import AS_STORED, apply_steps, open_recipe, shipped
from tests.conftest import FAMILIES, random_model, save


@pytest.mark.parametrize("recipe", [name for name in shipped() if name != "best-24-matched"])
@pytest.mark.parametrize("shape", [(40, 72), (64, 36)])
def test_the_form_of_the_steps_counts_the_bits_of_their_parts(recipe: str, shape: tuple[int, int]) -> None:
    steps = brief(resolved(open_recipe(recipe).steps))
    assert fitting(shape, steps) == shape
    parts = apply_steps(steps, *drawn_layer(shape, forms.needs_of(steps), dtype=torch.bfloat16, length=8)).parts()
    base = parts.base.inner if isinstance(parts.base, Pruned) else parts.base
    maybe = any(named.step.may_fit_codebook for named in steps)
    spared = codebook_bits(4) if maybe and not isinstance(base, Codebook) else 0
    assert form_of(steps, torch.bfloat16).bits(shape) == parts.storage_bits() + spared


EMBEDDINGS = {"llama", "llama-tied", "opt-projected", "gpt2"}
"""Families whose embedding and head differ in kind: apart, tied, narrower than the blocks, transposed linear layers."""


@pytest.mark.parametrize(
    ("recipe", "embedding_bits", "family"),
    [
        pytest.param(recipe, bits, family, marks=() if bits is None or family in EMBEDDINGS else pytest.mark.slow)
        for recipe, bits in (("slim", None), ("gptq", 8), ("sparsegpt-gptq", 5))
        for family in FAMILIES
    ],
)
def test_the_estimate_of_what_is_stored_is_what_is_stored(
    family: str, recipe: str, embedding_bits: int | None, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.pipeline.timed", lambda *_: None)
    folder = save(random_model(family, torch.bfloat16), tmp_path / "m")
    asked = {"recipe": recipe, "embedding_bits": embedding_bits, "samples": 6, "length": 32}
    expected = estimate(folder, **asked)  # type: ignore[arg-type]
    record = slimlm.compress(folder, tmp_path / "o", data=str(text_file), **asked).record  # type: ignore[arg-type]
    stored = [tensor for file in (tmp_path / "o").glob("*.safetensors") for tensor in load_file(file).values()]
    assert expected.stored_bytes == sum(tensor.nbytes for tensor in stored)
    assert expected.layer_bits == {layer.name: layer.bits for layer in record.layers}
    assert expected.layers == {layer.name: layer.shape for layer in record.layers}
    assert (expected.bits_per_weight, expected.original_bytes) == (record.bits_per_weight, record.original_bytes)
    assert expected.skipped == record.skipped


def test_an_estimate_reads_no_text_and_no_weight_where_a_block_does_not_fit(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (("slimlm.run.prepare", "weights_identity"), ("slimlm.calibration.samples", "draw_samples")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: pytest.fail("something was read"))
    found = estimate(llama_folder, recipe="absmax", samples=3, length=32)
    assert found.tokens == 96 and found.total_seconds is not None and found.total_seconds > 0
    monkeypatch.setattr(LazyModel, "_fill", lambda *_: pytest.fail("a weight was read"))
    monkeypatch.setattr("slimlm.preflight.estimate.total_and_free", lambda: (100, 100))
    monkeypatch.setattr("slimlm.pipeline.timed", lambda *_: None)
    problems = estimate(llama_folder, recipe="absmax", samples=3, length=32).problems
    assert ["the memory does not suffice" in problem for problem in problems] == [True]


def test_stages_and_inputs_are_those_of_the_model(llama_folder: Path) -> None:
    needs = needs_of(llama_folder, "best-24")
    names = [[name.rpartition(".")[2] for name in stage] for stage in needs.stages]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    first = next(iter(needs.blocks))
    assert needs.inputs == [[Sizes(*needs.shapes[f"{first}.{stage[0]}"], needs.length)] for stage in needs.stages]


def needs_of(folder: Path, recipe: str, samples: int = 8, length: int = 32) -> RunNeeds:
    dense, opened = open_lazy(str(folder), folder / "none", pytest.fail), open_recipe(recipe)
    embeddings = embeddings_of(dense.model, None if opened.embedding_bits == AS_STORED else opened.embedding_bits)
    return RunNeeds(dense, blocks_of(dense.model), opened, embeddings, {}, samples, length)


def test_what_is_held_grows_as_it_should(llama_folder: Path) -> None:
    slim, best = needs_of(llama_folder, "slim"), needs_of(llama_folder, "best-24")
    assert best.copies == best.streams == 2 and slim.copies == slim.streams == 1
    assert best.held_bytes == 2 * slim.held_bytes == 2 * 8 * 32 * best.width * 4
    assert needs_of(llama_folder, "best-24-matched").held_bytes == 3 * slim.held_bytes
    assert best.least_bytes > 2 * best.block_bytes > slim.least_bytes
    # Of one number per input the statistics take next to nothing.
    assert 0 < slim.least_bytes - slim.block_bytes == slim.statistics_bytes < 0.05 * slim.block_bytes
    more = needs_of(llama_folder, "slim", samples=80)
    assert more.disk_bytes >= slim.disk_bytes + 72 * 32 * slim.width * 4
    assert more.block_bytes == slim.block_bytes


def test_arguments_that_depend_on_the_text_take_memory_with_what_computes_them(llama_folder: Path) -> None:
    for recipe, more in (("slim", 1), ("best-24-matched", 2)):
        without = needs_of(llama_folder, recipe)
        needs = dataclasses.replace(without, text_dependent=True)
        kept = needs.tokens * needs.width * 4
        assert needs.outer_bytes + kept <= needs.working_bytes - without.working_bytes <= needs.outer_bytes + more * kept


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_least_counts_the_covariances_that_are_held_together(family: str, tmp_path: Path) -> None:
    needs = needs_of(save(random_model(family), tmp_path / "m"), "gptq")
    stages = [sum(sizes.inputs**2 for sizes in stage) for stage in needs.inputs]
    together = max(stages) if needs.recipe.sequential else sum(stages)
    assert needs.statistics_bytes == 12 * together and needs.least_bytes == needs.copies * needs.block_bytes + 12 * together
    assert needs.least_on_device == needs.copies * needs.block_bytes + 8 * together
    if family == "mixtral":
        experts = needs.dense.model.config.num_local_experts
        assert (
            max(map(len, needs.inputs)) == experts and together > experts * min(sizes.inputs for sizes in needs.inputs[-1]) ** 2
        )


def test_the_text_part_of_a_model_with_images_says_width_and_context() -> None:
    sizes = {"hidden_size": 48, "max_position_embeddings": 64, "num_hidden_layers": 1, "vocab_size": 72}
    outer = Gemma3Config(text_config=sizes)
    model = nn.Module()
    model.config = outer
    assert getattr(outer, "hidden_size", None) is None and context_length(model) == 64
    assert text_config(model).hidden_size == 48 and context_length(nn.Module()) is None
    assert getattr(outer, "vocab_size", None) is None and vocabulary_size(model) == 72 and vocabulary_size(nn.Module()) == 1


def test_a_plan_counts_the_vocabulary_of_the_text_part(llama_folder: Path) -> None:
    needs = dataclasses.replace(needs_of(llama_folder, "gptq"), bits=4.0)
    rates, nothing = Rates(1e9, 1e9, 1e9), StepCost(0.0, 0.0, 0.0, 0.0)

    def seconds() -> float:
        return planning_seconds(needs, rates, lambda name: nothing, 9)

    usual, config = seconds(), needs.dense.model.config
    needs.dense.model.config = Gemma3Config(text_config={"hidden_size": config.hidden_size, "vocab_size": config.vocab_size})
    assert seconds() == usual


def test_the_time_of_a_run_with_a_budget_counts_the_planning(llama_folder: Path) -> None:
    alone, planned = (estimate(llama_folder, bits=bits, samples=8, length=32, recipe="gptq") for bits in (None, 4.0))
    assert alone.seconds is not None and "plan" not in alone.seconds
    assert planned.seconds is not None and planned.total_seconds is not None
    assert 0 < planned.seconds["plan"] < planned.total_seconds == pytest.approx(sum(planned.seconds.values()))
    assert alone.samples == 8 and 0 < (alone.seconds_per_sample or 0) < (planned.seconds_per_sample or 0)


def test_a_further_sample_takes_what_twice_as_many_take_longer(llama_folder: Path) -> None:
    needs = needs_of(llama_folder, "gptq", samples=8)
    found = times_of(needs, lambda own: {"once": 5.0, "each": 2.0 * own.sample_count})
    assert (found.stages, found.per_sample) == ({"once": 5.0, "each": 16.0}, 2.0)
    rates, nothing = Rates(1e9, 1e9, 1e9), StepCost(0.0, 0.0, 0.0, 0.0)
    measured = times_of(needs, lambda own: seconds_of(own, rates, lambda name: nothing))
    assert 0 < 8 * measured.per_sample < sum(measured.stages.values())


def test_a_plan_takes_as_much_longer_as_an_option_more_costs_in_every_layer(llama_folder: Path) -> None:
    needs = dataclasses.replace(needs_of(llama_folder, "gptq"), bits=4.0)
    # Products and passes cost next to nothing here, so that the steps are all that takes time.
    rates, second = Rates(1e18, 1e18, 1e18), StepCost(1.0, 0.0, 0.0, 0.0)

    def seconds(options: int) -> float:
        return planning_seconds(needs, rates, lambda name: second, options)

    assert seconds(10) - seconds(9) == pytest.approx(len(needs.shapes))
    slow = dataclasses.replace(rates, products=1e3)
    assert planning_seconds(needs, slow, lambda name: second, 9) > 2 * seconds(9)


def test_the_time_of_the_steps_counts_the_output_errors_of_a_recipe_with_covariances(llama_folder: Path) -> None:
    rates, nothing = Rates(1e6, 1e18, 1e18), StepCost(0.0, 0.0, 0.0, 0.0)

    def steps(recipe: str) -> float:
        return seconds_of(needs_of(llama_folder, recipe), rates, lambda name: nothing)["steps"]

    shapes = needs_of(llama_folder, "gptq").shapes.values()
    assert steps("slim") == 0 and steps("gptq") == pytest.approx(sum(4 * out * width**2 for out, width in shapes) / 1e6)
