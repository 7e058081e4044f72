"""Compression on a GPU, without one: a whole block is compressed where every tensor reports to be elsewhere.

Values are those of the CPU, to the bit: the same kernels run. Where a GPU computes otherwise is for test_compress_on_gpu.py.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimlm.calibration import measurement
from slimlm.calibration.capture import BlockInputs, BlockRun, enter
from slimlm.core.grid import Grid
from slimlm.core.mask import Pattern
from slimlm.core.solvers.adapter_descent import descend_adapter
from slimlm.core.solvers.base_descent import descend_base
from slimlm.core.solvers.inverse import inverse_of
from slimlm.core.solvers.low_rank import AdapterFormat, low_rank_part
from slimlm.core.solvers.order import order_of
from slimlm.core.solvers.sweep import rounded_sweep
from slimlm.core.statistics.covariance import Covariance
from slimlm.kernels import compression
from slimlm.models.structure import blocks_of, linears_of
from slimlm.recipe import Recipe, open_recipe
from slimlm.run.block import BlockTask, compress_block
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.memory import free_on_gpu
from tests.conftest import VOCABULARY, random_model
from tests.fake_gpu import FAKE_GPU, FakeGpuTensor, MixedDevicesError, fake_gpu, to_fake_gpu, unwrapped

CPU = torch.device("cpu")
LENGTH = 16


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def first_block(windows: int = 6) -> tuple[nn.Module, str, BlockInputs, dict[str, torch.dtype]]:
    model = random_model("llama")
    # Attention of another device than the CPU is computed otherwise; spelled out, it is the same operations everywhere.
    model.set_attn_implementation("eager")
    blocks = blocks_of(model)
    tokens = torch.randint(VOCABULARY, (windows, LENGTH), generator=torch.Generator().manual_seed(3))
    flow = enter(model, blocks, tokens)
    name, block = next(iter(blocks.items()))
    return block.requires_grad_(False), name, flow, {key: tensor.dtype for key, tensor in model.state_dict().items()}


def compressed(recipe: Recipe, device: torch.device) -> tuple[dict[str, Tensor], list[Any]]:
    """What a block becomes: the matrices of its layers on the CPU, and the records."""
    block, name, flow, dtypes = first_block()
    original = copy.deepcopy(block)
    if device != CPU:
        block, original = to_fake_gpu(block), to_fake_gpu(original)
    original_inputs = BlockInputs(list(flow.hidden), flow.arguments)
    task = BlockTask(name, block, flow, recipe, dtypes, device, original, original_inputs)
    records = [layer.record for layer in compress_block(task)]
    layers = {n: m for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
    assert all(tensor.device == device for layer in layers.values() for tensor in layer.packed().values())
    return {n: unwrapped(layer.parts().dense()) for n, layer in layers.items()}, records


def quick(recipe: Recipe) -> Recipe:
    """The recipe for two layers of the seven, with few rounds where it has rounds."""
    steps = []
    for named in recipe.steps:
        fields = {field.name for field in dataclasses.fields(named.step)}
        few = {name: value for name, value in {"rounds": 3, "descent_rounds": 1}.items() if name in fields}
        steps.append(dataclasses.replace(named, step=dataclasses.replace(named.step, **few)))
    ignore = ("*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "*.up_proj")
    return dataclasses.replace(recipe, steps=tuple(steps), ignore=ignore)


RECIPES = ["best-24", "gptq-32", "slim", "slim-paper", "jsq", "l2qer", "qera"]
LONG = ["hassle-free", "oats"]
"""They alternate for as long as `best-24`, through the same code."""


@pytest.mark.parametrize(
    ("name", "room"),
    [
        *((name, 2**40) for name in RECIPES),
        *(pytest.param(name, 2**40, marks=pytest.mark.slow) for name in LONG),
        ("slim", 0),
        ("gptq-32", 0),
    ],
    ids=lambda value: {0: "statistics on the CPU", 2**40: "statistics on the card"}.get(value, value),
)
def test_a_recipe_compresses_on_the_card_what_it_compresses_on_the_cpu(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick(open_recipe(name))
    monkeypatch.setattr(measurement, "free_on_gpu", lambda device: room)
    # The form that a GPU runs; the loops in C++ differ from it by rounding.
    monkeypatch.setattr(compression, "available", lambda: False)
    expected, told = compressed(recipe, CPU)
    with fake_gpu() as counts:
        found, also = compressed(recipe, FAKE_GPU)
    assert counts.operations > 100
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert [record.error for record in also] == [record.error for record in told]


def test_statistics_lie_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    block, name, flow, _ = first_block()
    for room, place in ((2**40, FAKE_GPU), (10_000, CPU)):
        monkeypatch.setattr(measurement, "free_on_gpu", lambda device, room=room: room)
        with fake_gpu():
            sent = to_fake_gpu(copy.deepcopy(block))
            found = measurement.measure(BlockRun(sent, name, flow, FAKE_GPU), linears_of(sent), frozenset({Covariance}))
            assert {stats[Covariance].device for stats in found.values()} == {place}


def test_what_torch_holds_of_a_card_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("mem_get_info", (100, 1000)), ("memory_reserved", 700), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_on_gpu(torch.device("cuda", 0)) == 500


def test_a_sweep_and_its_coordinate_descents_wait_for_a_card_by_the_group_and_not_by_the_weight() -> None:
    """At 48 inputs in groups of 16; an earlier form asked at every input, and at every fourth for the order."""
    width, out = 48, 24
    x, weight = draw(200, width), draw(out, width)
    gram = x.T @ x / len(x)
    grid, pattern = Grid.of_bits(4), Pattern.parse("2:4")
    with fake_gpu() as counts:
        weight, gram = weight.to(FAKE_GPU), gram.to(FAKE_GPU)
        order = order_of(gram.diagonal(), group_size=16, pattern=pattern)
        inverse = inverse_of(gram.index_select(0, order.inputs).index_select(1, order.inputs), damp=0.01)
        assert counts.waits < 8
        before = counts.waits
        base = rounded_sweep(weight, inverse, order, grid=grid, pattern=pattern)
        assert counts.waits - before < 8 * 3
        before = counts.waits
        descend_base(weight, gram, base, group_size=16, pattern=None)
        assert counts.waits - before < 8 * 3
        adapter = low_rank_part(weight, gram, AdapterFormat(0.25, 4, 16, True))
        assert adapter is not None
        before = counts.waits
        descend_adapter(weight, gram, adapter)
        assert counts.waits - before < 8


def test_a_forgotten_device_is_found() -> None:
    with fake_gpu(), pytest.raises(MixedDevicesError, match=r"\[\[4\]\] on the CPU with tensors on the GPU"):
        torch.zeros(4, device=FAKE_GPU) + torch.ones(4)


def test_what_is_written_in_place_and_through_views_is_written() -> None:
    with fake_gpu() as counts:
        one = torch.zeros(2, 3, device=FAKE_GPU)
        one[1].add_(2)
        torch.mul(one, one, out=one)
        assert isinstance(one, FakeGpuTensor) and one.sum().item() == 12.0 and one[torch.tensor([1])].shape == (1, 3)
    assert counts.waits == 1
