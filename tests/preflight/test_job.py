"""What a run will store follows from shapes alone, and equals what it stores."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Gemma3Config

import slimlm
from slimlm.calibration.samples import Calibration
from slimlm.core.parts import Codebook, Pruned
from slimlm.core.statistics.base import Sizes
from slimlm.core.stored import table_bits
from slimlm.models.lazy import StreamedModel, open_streamed
from slimlm.models.structure import blocks_of, context_length, text_config
from slimlm.pipeline import Asked, estimate
from slimlm.planner.forms import brief, drawn_layer, fitting, form_of, needs_of, resolved
from slimlm.preflight.job import Job
from slimlm.recipe import apply_steps, open_recipe, shipped
from slimlm.run.embeddings import ends_of
from tests.conftest import FAMILIES, random_model, save


@pytest.mark.parametrize("recipe", [name for name in shipped() if name != "best-matched"])
@pytest.mark.parametrize("shape", [(40, 72), (64, 36)])
def test_the_form_of_the_steps_counts_the_bits_of_their_parts(recipe: str, shape: tuple[int, int]) -> None:
    steps = brief(resolved(open_recipe(recipe).steps))
    assert fitting(shape, steps) == shape
    parts = apply_steps(steps, *drawn_layer(shape, needs_of(steps), dtype=torch.bfloat16, length=8)).parts()
    base = parts[0].inner if isinstance(parts[0], Pruned) else parts[0]
    maybe = any(named.step.may_fit_codebook for named in steps)
    spared = table_bits(4) if maybe and not isinstance(base, Codebook) else 0
    assert form_of(steps, torch.bfloat16).bits(shape) == sum(part.storage_bits() for part in parts) + spared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("recipe", "embedding_bits"), [("slim", None), ("gptq", 8), ("sparsegpt-gptq", 5)])
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
    assert expected.left == record.left


def test_no_weight_is_read_for_an_estimate(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("slimlm.pipeline", "read_once"), ("slimlm.calibration.samples", "calibration_windows")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: pytest.fail("something was read"))
    monkeypatch.setattr(StreamedModel, "_put", lambda *_: pytest.fail("a weight was read"))
    found = estimate(llama_folder, recipe="absmax", samples=3, length=32)
    assert found.tokens == 96 and found.total_seconds is not None and found.total_seconds > 0


def test_stages_and_inputs_are_those_of_the_model(llama_folder: Path) -> None:
    job = job_of(llama_folder, "best")
    names = [[name.rpartition(".")[2] for name in stage] for stage in job.stages]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    first = next(iter(job.blocks))
    assert job.inputs == [[Sizes(*job.shapes[f"{first}.{stage[0]}"], job.length)] for stage in job.stages]


def job_of(folder: Path, recipe: str, samples: int = 8, length: int = 32) -> Job:
    dense = open_streamed(str(folder), folder / "none", pytest.fail)
    asked = Asked(str(folder), open_recipe(recipe), None, "size", Calibration(samples=samples, length=length), "cpu", None)
    ends = ends_of(dense.model, asked.recipe.embedding_bits)
    return Job(dense, blocks_of(dense.model), asked.recipe, ends, {}, samples, length)


def test_what_is_held_grows_as_it_should(llama_folder: Path) -> None:
    slim, best = job_of(llama_folder, "slim"), job_of(llama_folder, "best")
    assert best.copies == best.streams == 2 and slim.copies == slim.streams == 1
    assert best.held_bytes == 2 * slim.held_bytes == 2 * 8 * 32 * best.width * 4
    assert job_of(llama_folder, "best-matched").held_bytes == 3 * slim.held_bytes
    assert best.least_bytes > 2 * best.block_bytes > slim.least_bytes
    # Of one number per input the statistics take next to nothing.
    assert 0 < slim.least_bytes - slim.block_bytes == slim.statistics_bytes < 0.05 * slim.block_bytes
    more = job_of(llama_folder, "slim", samples=80)
    assert more.disk_bytes >= slim.disk_bytes + 72 * 32 * slim.width * 4
    assert more.block_bytes == slim.block_bytes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_least_counts_the_covariances_that_are_held_together(family: str, tmp_path: Path) -> None:
    job = job_of(save(random_model(family), tmp_path / "m"), "gptq")
    stages = [sum(sizes.inputs**2 for sizes in stage) for stage in job.inputs]
    together = max(stages) if job.recipe.sequential else sum(stages)
    assert job.statistics_bytes == 12 * together and job.least_bytes == job.copies * job.block_bytes + 12 * together
    assert job.least_on_device == job.copies * job.block_bytes + 8 * together
    if family == "mixtral":
        experts = job.dense.model.config.num_local_experts
        assert max(map(len, job.inputs)) == experts and together > experts * min(sizes.inputs for sizes in job.inputs[-1]) ** 2


def test_the_text_part_of_a_model_with_images_says_width_and_context() -> None:
    outer = Gemma3Config(text_config={"hidden_size": 48, "max_position_embeddings": 64, "num_hidden_layers": 1})
    model = nn.Module()
    model.config = outer
    assert getattr(outer, "hidden_size", None) is None and context_length(model) == 64
    assert text_config(model).hidden_size == 48 and context_length(nn.Module()) is None
