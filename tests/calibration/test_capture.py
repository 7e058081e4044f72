"""Calibration: what is measured, on which inputs, and how often."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slimlm
from slimlm.calibration.calls import BlockArguments
from slimlm.calibration.capture import BlockInputs, BlockRun, enter, run
from slimlm.calibration.measurement import measure
from slimlm.calibration.stages import stages_of
from slimlm.core.errors import ModelError, NumericsError
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Statistic, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.cross_covariance import CrossCovariance
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_sample import MeanSample
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.output_residual_covariance import OutputResidualCovariance
from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.core.statistics.peak_mean_abs import PeakMeanAbs
from slimlm.methods.quantize.gptq import Gptq
from slimlm.models.structure import blocks_of, linears_of, swap, weight_of
from slimlm.preflight.refusals import warn_of_few_tokens
from slimlm.recipe import recipe_from_dict
from slimlm.record import Record
from slimlm.run.block import BlockTask, compress_block
from tests.conftest import random_model

CPU = torch.device("cpu")
EVERYTHING = frozenset({MeanAbs, MeanSquare, PeakMeanAbs, PeakAbs, MeanSample})
BOTH = frozenset({Covariance, CrossCovariance})


def windows(count: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def first_block(family: str = "llama") -> tuple[nn.Module, dict[str, nn.Module], str]:
    model = random_model(family)
    blocks = blocks_of(model)
    return model, blocks, next(iter(blocks))


def test_statistics_equal_those_of_the_inputs_themselves() -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(3))
    stats = measure(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]), EVERYTHING)
    seen: list[torch.Tensor] = []
    handle = blocks[name].get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    list(run(BlockRun(blocks[name], name, flow, CPU)))
    handle.remove()
    x = torch.cat(seen).double()  # [3, 32, in]
    found = stats["mlp.down_proj"]
    assert found.tokens == 96
    # sums run in float64; the means are rounded to float32
    assert torch.allclose(found[MeanAbs].double(), x.abs().mean(dim=(0, 1)), rtol=1e-6)
    assert torch.allclose(found[MeanSquare].double(), x.square().mean(dim=(0, 1)), rtol=1e-6)
    assert torch.allclose(found[PeakMeanAbs].double(), x.abs().mean(dim=1).amax(dim=0), rtol=1e-5)
    assert torch.equal(found[PeakAbs].double(), x.abs().amax(dim=(0, 1)))
    assert torch.allclose(found[MeanSample].double(), x.mean(dim=0), rtol=1e-6)


@pytest.mark.parametrize("family_name", ["llama", "opt"])  # OPT hands its fc layers [tokens, in], without windows
def test_the_cut_into_batches_and_their_order_do_not_matter(family_name: str) -> None:  # law 20
    model, blocks, name = first_block(family_name)
    rows = windows(7)
    whole = measure(BlockRun(blocks[name], name, enter(model, blocks, rows), CPU), linears_of(blocks[name]), EVERYTHING)
    flow = enter(model, blocks, rows.flip(0), tokens_at_once=96)
    assert len(flow.hidden) == 3
    pieces = measure(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]), EVERYTHING)
    for layer, expected in whole.items():
        assert expected.tokens == pieces[layer].tokens and expected.note == pieces[layer].note
        for statistic in EVERYTHING:
            # 1e-6: a position's mean may cancel to nearly nothing, and a batch of another size sums in another order.
            close = torch.allclose(expected[statistic], pieces[layer][statistic], rtol=1e-5, atol=1e-6)
            assert close, (layer, statistic)


def test_layers_with_one_input_share_one_measurement() -> None:
    model, blocks, name = first_block()
    stats = measure(BlockRun(blocks[name], name, enter(model, blocks, windows(2)), CPU), linears_of(blocks[name]), EVERYTHING)
    assert stats["self_attn.q_proj"] is stats["self_attn.k_proj"] is stats["self_attn.v_proj"]
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert stats["mlp.gate_proj"] is not stats["mlp.down_proj"]


def test_only_what_is_needed_is_measured() -> None:
    model, blocks, name = first_block()
    stats = measure(
        BlockRun(blocks[name], name, enter(model, blocks, windows(2)), CPU), linears_of(blocks[name]), frozenset({MeanSquare})
    )["mlp.down_proj"]
    assert stats.values.keys() == {MeanSquare} and stats[MeanSquare].shape == (88,)


@pytest.mark.parametrize("need", sorted(EVERYTHING, key=str))
@pytest.mark.parametrize("family_name", ["llama", "opt"])  # OPT hands its fc layers [tokens, in], without windows
def test_a_statistic_needs_no_other(need: type[Statistic], family_name: str) -> None:
    model, blocks, name = first_block(family_name)
    flow = enter(model, blocks, windows(3))
    whole = measure(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]), EVERYTHING)
    alone = measure(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]), frozenset({need}))
    for layer, stats in alone.items():
        assert stats.values.keys() == {need} and not len(stats.cache)
        assert torch.equal(stats[need], whole[layer][need])
        assert stats[need].shape[:-1] == ((32,) if need is MeanSample else ())


def test_the_second_block_is_measured_on_the_changed_first_block_s_outputs() -> None:  # law 22
    model, blocks, name = first_block()
    rows = windows(2)
    flow = enter(model, blocks, rows)
    with torch.no_grad():
        blocks[name].get_submodule("mlp.down_proj").weight.mul_(0.5)
    second = list(blocks)[1]
    flow = BlockInputs(list(run(BlockRun(blocks[name], name, flow, CPU))), flow.arguments)
    seen: list[torch.Tensor] = []
    handle = blocks[second].register_forward_pre_hook(lambda _m, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        model(rows, use_cache=False)
    handle.remove()
    assert torch.allclose(torch.cat(flow.hidden), seen[0], atol=1e-6)


def test_calibration_changes_neither_the_config_nor_the_weights_nor_the_hooks() -> None:  # law 22
    model, blocks, name = first_block("gpt2")
    config = model.config.to_dict()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    measure(BlockRun(blocks[name], name, enter(model, blocks, windows(2)), CPU), linears_of(blocks[name]), EVERYTHING)
    assert model.config.to_dict() == config
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_model_that_works_between_its_blocks_is_refused_by_name() -> None:
    model, blocks, _ = first_block()
    stack = model.model.layers

    class Doubling(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return self.inner(hidden_states * 2, **kwargs)

    inner = stack[1]
    stack[1] = Doubling(inner)
    with pytest.raises(ModelError, match=r"model\.layers\.0 and model\.layers\.1"):
        enter(model, {"model.layers.0": blocks["model.layers.0"], "model.layers.1": inner}, windows(2))


@pytest.mark.parametrize("need", sorted({*EVERYTHING, Covariance}, key=str))
def test_inputs_that_overflow_name_the_layer(need: type[Statistic]) -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(2))
    flow.hidden[0][0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        measure(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]), frozenset({need}))


def test_gpt2_s_transposed_layers_are_found() -> None:
    _, blocks, name = first_block("gpt2")
    assert set(linears_of(blocks[name])) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


# Covariances of two models' inputs


def inputs_of(block: nn.Module, name: str, layers: list[str], flow: BlockInputs) -> dict[str, torch.Tensor]:
    """All inputs of these layers at once, float64 `[tokens, in]`."""
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(lambda _m, args, layer=layer: seen[layer].append(args[0]))
        for layer in layers
    ]
    list(run(BlockRun(block, name, flow, CPU)))
    for handle in handles:
        handle.remove()
    return {layer: torch.cat([x.flatten(0, -2) for x in own]).double() for layer, own in seen.items()}


def damaged_twin(family: str = "llama") -> tuple[dict[str, nn.Module], dict[str, nn.Module], str]:
    """Blocks, and those of the same model with a first block that was changed; the second block's name."""
    _, before, name = first_block(family)
    _, after, _ = first_block(family)
    with torch.no_grad():
        for module in linears_of(after[name]).values():
            module.get_parameter("weight").mul_(0.9)
    return before, after, list(before)[1]


def flows(
    family: str, rows: torch.Tensor, at_once: int | None = None
) -> tuple[nn.Module, nn.Module, str, BlockInputs, BlockInputs]:
    """The second block of the original model and of the changed one, its name, and its inputs in either."""
    before, after, second = damaged_twin(family)
    model = random_model(family)
    flow = enter(model, blocks_of(model), rows, tokens_at_once=at_once)
    first = next(iter(before))
    theirs = BlockInputs(list(run(BlockRun(before[first], first, flow, CPU))), flow.arguments)
    ours = BlockInputs(list(run(BlockRun(after[first], first, flow, CPU))), flow.arguments)
    return before[second], after[second], second, theirs, ours


@pytest.mark.parametrize("family_name", ["llama", "opt", "gpt2"])
def test_covariances_equal_those_of_all_inputs_at_once(family_name: str) -> None:  # law 19
    twin, block, name, theirs, ours = flows(family_name, windows(3))
    linears = linears_of(block)
    stats = measure(BlockRun(block, name, ours, CPU), linears, BOTH, BlockRun(twin, name, theirs, CPU))
    now, were = inputs_of(block, name, list(linears), ours), inputs_of(twin, name, list(linears), theirs)
    for layer, found in stats.items():
        x, z = now[layer], were[layer]
        assert found.tokens == 96
        # Products of a batch are float32: relative to the largest energy.
        largest = float((x.T @ x / 96).diagonal().max())
        torch.testing.assert_close(found[Covariance].double(), x.T @ x / 96, rtol=1e-5, atol=1e-6 * largest)
        torch.testing.assert_close(found[CrossCovariance].double(), z.T @ x / 96, rtol=1e-5, atol=1e-6 * largest)
        assert torch.equal(found[Covariance], found[Covariance].T)
        assert not torch.allclose(found[CrossCovariance], found[Covariance], rtol=1e-2)  # the two models' inputs differ


@pytest.mark.parametrize("family_name", ["llama", "opt"])
@pytest.mark.parametrize("at_once", [32, 96])
def test_the_cut_into_batches_and_their_order_do_not_matter_for_covariances(family_name: str, at_once: int) -> None:  # law 20
    needs = BOTH
    rows = windows(7)
    twin, block, name, theirs, ours = flows(family_name, rows)
    whole = measure(BlockRun(block, name, ours, CPU), linears_of(block), needs, BlockRun(twin, name, theirs, CPU))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    twin, block, name, theirs, ours = flows(family_name, rows[order], at_once)
    assert len(ours.hidden) == -(-7 * 32 // at_once)
    pieces = measure(BlockRun(block, name, ours, CPU), linears_of(block), needs, BlockRun(twin, name, theirs, CPU))
    for layer, expected in whole.items():
        for one, other in (
            (expected[Covariance], pieces[layer][Covariance]),
            (expected[CrossCovariance], pieces[layer][CrossCovariance]),
        ):
            # Products of a batch are float32, and a batch of another size sums in another order.
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6 * float(one.diagonal().max()))


def test_the_energies_are_the_diagonal_of_the_covariance() -> None:
    model, blocks, name = first_block()
    stats = measure(
        BlockRun(blocks[name], name, enter(model, blocks, windows(3)), CPU),
        linears_of(blocks[name]),
        frozenset({Covariance, MeanSquare}),
    )
    for found in stats.values():
        torch.testing.assert_close(found[Covariance].diagonal(), found[MeanSquare], rtol=1e-5, atol=0)  # float32 products


def test_an_unchanged_block_s_inputs_go_with_the_original_ones_as_with_themselves() -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(3))
    twin = blocks_of(random_model("llama"))[name]
    stats = measure(
        BlockRun(blocks[name], name, flow, CPU),
        linears_of(blocks[name]),
        BOTH,
        BlockRun(twin, name, flow, CPU),
    )
    for found in stats.values():
        assert torch.equal(found[CrossCovariance], found[Covariance])


class _Routed(nn.Module):
    """A block whose two experts are given tokens by the sign of the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(hidden_states).flatten(0, -2)
        out = hidden.clone()
        for sign, expert in zip((1, -1), self.experts, strict=True):
            chosen = sign * hidden[:, 0] > 0
            out[chosen] += expert(hidden[chosen])
        return out.view(hidden_states.shape)


def routed() -> tuple[_Routed, _Routed, BlockInputs]:
    torch.manual_seed(3)
    twin, block = _Routed().eval(), _Routed().eval()
    block.load_state_dict(twin.state_dict())
    hidden = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(4))
    return twin, block, BlockInputs([hidden[:3], hidden[3:]], BlockArguments({("b", n): ((None,), {}) for n in (1, 3)}))


def test_an_expert_that_is_given_other_tokens_has_no_cross_statistic_and_the_others_do() -> None:
    twin, block, flow = routed()
    with torch.no_grad():
        block.inner.bias[0] += 0.5  # some tokens change sides
    stats = measure(
        BlockRun(block, "b", flow, CPU),
        linears_of(block),
        BOTH,
        BlockRun(twin, "b", flow, CPU),
    )
    assert stats["inner"].get(CrossCovariance) is not None
    assert stats["experts.0"].get(CrossCovariance) is None and stats["experts.1"].get(CrossCovariance) is None
    assert stats["experts.0"].get(Covariance) is not None
    assert stats["experts.0"].tokens + stats["experts.1"].tokens == 64


def test_experts_that_are_given_some_of_the_tokens_have_no_cross_statistic_even_where_these_are_the_same() -> None:
    twin, block, flow = routed()
    stats = measure(
        BlockRun(block, "b", flow, CPU),
        linears_of(block),
        BOTH,
        BlockRun(twin, "b", flow, CPU),
    )
    assert all(
        0 < stats[expert].tokens < 64 and stats[expert].get(CrossCovariance) is None for expert in ("experts.0", "experts.1")
    )
    assert torch.equal(stats["inner"][CrossCovariance], stats["inner"][Covariance])


@pytest.mark.parametrize("also_before", [True, False])
def test_an_expert_that_is_given_all_tokens_has_a_cross_statistic_if_it_was_before(also_before: bool) -> None:
    twin, block, flow = routed()
    with torch.no_grad():
        for each in (block, twin) if also_before else (block,):
            each.inner.bias[0] += 100  # every token goes to the first expert
    linears = {"experts.0": block.experts[0]}
    found = measure(BlockRun(block, "b", flow, CPU), linears, BOTH, BlockRun(twin, "b", flow, CPU))["experts.0"]
    assert found.tokens == 64
    if also_before:
        assert torch.equal(found[CrossCovariance], found[Covariance])
    else:
        assert found.get(CrossCovariance) is None


def test_an_expert_that_is_given_all_tokens_of_one_batch_only_has_no_cross_statistic() -> None:
    twin, block, flow = routed()
    sides = torch.sign(block.inner(flow.hidden[1])[..., :1])
    # The second batch is all on one side; the first is mixed.
    one_sided = torch.where(sides > 0, flow.hidden[1], flow.hidden[1].flatten(0, 1)[int(sides.flatten().argmax())])
    for hidden in ([flow.hidden[0], one_sided], [one_sided, flow.hidden[0]]):
        both = BlockInputs(hidden, flow.arguments)
        found = measure(
            BlockRun(block, "b", both, CPU),
            {"experts.0": block.experts[0]},
            BOTH,
            BlockRun(twin, "b", both, CPU),
        )
        assert 16 < found["experts.0"].tokens < 64
        assert found["experts.0"].get(CrossCovariance) is None


def _swapped() -> dict[str, Stats]:
    """Two experts with equally many tokens, which in the original model each of the other was given."""
    twin, block, flow = routed()
    with torch.no_grad():
        for parameter in (block.inner.weight, block.inner.bias):
            parameter[0] *= -1  # every token changes sides
        tokens = torch.cat(flow.hidden).flatten(0, 1)
        sides = block.inner(tokens)[:, 0] > 0
    count = int(min(sides.sum(), (~sides).sum()))
    even = torch.cat([tokens[sides][:count], tokens[~sides][:count]])[:, None]
    flow = BlockInputs([even], BlockArguments({("b", 2 * count): ((None,), {})}))
    stats = measure(
        BlockRun(block, "b", flow, CPU), linears_of(block), frozenset({CrossCovariance}), BlockRun(twin, "b", flow, CPU)
    )
    if not stats["experts.0"].tokens == stats["experts.1"].tokens > 10:
        raise RuntimeError("the example is none")
    return stats


def test_as_many_other_tokens_are_no_reason_to_pair_them() -> None:
    assert _swapped()["experts.0"].get(CrossCovariance) is None


def test_a_covariance_that_overflows_names_the_layer() -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(2))
    flow.hidden[0][0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        measure(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]), frozenset({Covariance}))


# Stages

LLAMA_STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
OPT_STAGES = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]]
STAGES = {
    "llama": LLAMA_STAGES,
    "qwen3": LLAMA_STAGES,
    "mistral-window": LLAMA_STAGES,
    "opt": OPT_STAGES,
    "opt-projected": OPT_STAGES,
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
}


@pytest.mark.parametrize("family_name", sorted(STAGES))
def test_stages_follow_the_way_of_the_activations(family_name: str) -> None:
    model, blocks, name = first_block(family_name)
    found = stages_of(BlockRun(blocks[name], name, enter(model, blocks, windows(2)), CPU), linears_of(blocks[name]))
    assert [sorted(stage) for stage in found] == [sorted(stage) for stage in STAGES[family_name]]


def test_layers_that_are_left_are_in_no_stage() -> None:
    model, blocks, name = first_block()
    some = {layer: linear for layer, linear in linears_of(blocks[name]).items() if layer != "self_attn.o_proj"}
    found = stages_of(BlockRun(blocks[name], name, enter(model, blocks, windows(2)), CPU), some)
    assert [sorted(stage) for stage in found] == [sorted(LLAMA_STAGES[i]) for i in (0, 2, 3)]


def test_the_experts_are_one_stage_even_where_one_is_given_no_token() -> None:
    twin, _, flow = routed()
    for hidden in (flow.hidden, [hidden[:, :1] for hidden in flow.hidden]):
        assert stages_of(BlockRun(twin, "b", BlockInputs(hidden, flow.arguments), CPU), linears_of(twin)) == [
            ["inner"],
            ["experts.0", "experts.1"],
        ]
    with torch.no_grad():
        twin.inner.bias[0] += 100
    assert stages_of(BlockRun(twin, "b", flow, CPU), linears_of(twin)) == [["inner"], ["experts.0", "experts.1"]]


def test_finding_the_stages_leaves_the_block_as_it_is() -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(2))
    before = {n: t.clone() for n, t in blocks[name].state_dict().items()}
    hidden = [h.clone() for h in flow.hidden]
    stages_of(BlockRun(blocks[name], name, flow, CPU), linears_of(blocks[name]))
    assert all(torch.equal(before[n], t) for n, t in blocks[name].state_dict().items())
    assert all(torch.equal(one, other) for one, other in zip(hidden, flow.hidden, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in blocks[name].modules())


@pytest.mark.parametrize("family_name", ["llama", "opt", "gpt2"])
def test_a_stage_is_measured_on_what_the_compressed_stages_before_it_hand_over(family_name: str) -> None:  # law 22
    model, blocks, name = first_block(family_name)
    flow = enter(model, blocks, windows(2))
    block = blocks[name]
    linears = linears_of(block)
    done: list[str] = []
    for stage in stages_of(BlockRun(block, name, flow, CPU), linears):
        found = measure(BlockRun(block, name, flow, CPU), {layer: linears[layer] for layer in stage}, frozenset({Covariance}))
        # An independent way: the whole block run from the start, its earlier layers being the compressed ones.
        for layer, x in inputs_of(block, name, stage, flow).items():
            gram = found[layer][Covariance]
            assert gram is not None
            torch.testing.assert_close(gram.double(), x.T @ x / 64, rtol=1e-5, atol=1e-6 * float(gram.diagonal().max()))
        for layer in stage:
            out, width = weight_of(linears[layer]).shape
            smaller = nn.Linear(width, out)
            smaller.weight.data = 0.5 * weight_of(linears[layer])
            smaller.bias.data.zero_()
            swap(block, layer, smaller)
            done.append(layer)
    assert sorted(done) == sorted(linears)
    fresh = first_block(family_name)[1][name]
    last = done[-1]
    before = inputs_of(fresh, name, [last], flow)[last]
    assert not torch.allclose(inputs_of(block, name, [last], flow)[last], before, rtol=0.1)


@pytest.mark.parametrize("sequential", [False, True])
def test_only_a_recipe_that_says_so_measures_stage_by_stage(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # By way of the pipeline: what the step of the last layer is given.
    model, blocks, name = first_block()
    block, last = blocks[name], "mlp.down_proj"
    flow = enter(model, blocks, windows(8))
    seen: dict[str, torch.Tensor] = {}
    unspied = Gptq.__call__

    def spy(self: Gptq, layer: Layer, stats: Stats) -> Layer:
        seen[layer.name] = stats[Covariance].double()
        return unspied(self, layer, stats)

    monkeypatch.setattr(Gptq, "__call__", spy)
    before = inputs_of(block, name, [last], flow)[last]
    data = {"sequential": sequential, "steps": [{"quantize": "gptq", "bits": 2, "group_size": 8}]}
    dtypes = {n: t.dtype for n, t in model.state_dict().items()}
    compress_block(BlockTask(name, block, flow, recipe_from_dict(data, source="test"), dtypes, CPU))
    after = inputs_of(block, name, [last], flow)[last]
    one, other = (x.T @ x / len(x) for x in (before, after))
    largest = float(one.abs().max())
    assert float((one - other).abs().max()) > 0.01 * largest  # two bits change the activations
    torch.testing.assert_close(seen[f"{name}.{last}"], other if sequential else one, rtol=1e-4, atol=1e-6 * largest)  # float32


# Too few tokens for a covariance: the widest layers here have 88 inputs and need 176, the others 48 and need 96


def compressed_with(
    llama_folder: Path, text_file: Path, out: Path, step: dict[str, Any], windows: int, leave: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The messages while compressing on that many windows of 32 tokens, and every layer's notes in the record on disk."""
    told: list[str] = []
    recipe = recipe_from_dict({"steps": [step], "ignore": list(leave)}, source="test")
    slimlm.compress(llama_folder, out, recipe=recipe, data=str(text_file), samples=windows, length=32, notify=told.append)
    record = Record.from_dict(json.loads((out / "slimlm.json").read_text()))
    return told, {layer.name: tuple(layer.notes) for layer in record.layers}


GPTQ = {"quantize": "gptq", "group_size": 16}


@pytest.mark.parametrize("follow", [None, 0.0, 0.1])
def test_fewer_tokens_than_two_for_each_input_are_told_once_and_noted_for_the_layers_that_have_too_few(
    llama_folder: Path, text_file: Path, tmp_path: Path, follow: float | None
) -> None:
    joint = {"joint": "alternation", "group_size": 16, "rank": 0.0, "rounds": 1, "descent_rounds": 0, "asymmetric": follow}
    step = GPTQ if follow is None else joint
    told, notes = compressed_with(llama_folder, text_file, tmp_path / "out", step, 4, ("*.layers.0.*",))
    assert len(told) == 1
    assert "calibration has 128 tokens" in told[0] and "mlp.down_proj, 88 inputs) needs 176" in told[0]
    assert "`samples`" in told[0]
    wide = {name: own for name, own in notes.items() if name.endswith("down_proj")}
    assert len(wide) == 1 and len(notes) == 7
    for own in wide.values():
        assert "128 calibration tokens for the covariance of 88 inputs, which needs 176" in own[0]
        assert any("no asymmetric calibration" in note for note in own) == bool(follow)
    assert all(own == () for name, own in notes.items() if name not in wide)


def test_tokens_enough_for_every_layer_that_is_compressed_need_no_message(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    for number, (step, windows, leave) in enumerate(
        [(GPTQ, 6, ()), (GPTQ, 4, ("*.down_proj",)), ({"quantize": "absmax"}, 1, ()), ({"prune": "wanda"}, 1, ())]
    ):
        told, notes = compressed_with(llama_folder, text_file, tmp_path / str(number), step, windows, leave)
        assert told == []
        assert set(notes.values()) == {()}


@pytest.mark.parametrize("tokens", [0, 175, 176, 1000])
def test_the_widest_layer_decides_whether_there_are_tokens_enough(tokens: int) -> None:
    told: list[str] = []
    warn_of_few_tokens({"a": (500, 48), "b": (12, 88), "c": (88, 48)}, tokens, told.append)
    assert [("b, 88 inputs" in text, f"{tokens} tokens" in text) for text in told] == ([(True, True)] if tokens < 176 else [])


ADDED = {"llama": "mlp.down_proj", "qwen3": "mlp.down_proj", "opt": "fc2", "gpt2": "mlp.c_proj"}


@pytest.mark.parametrize("kind", sorted(ADDED))
def test_output_residuals_are_known_where_a_layer_s_output_is_added_to_the_block_s_and_nowhere_else(kind: str) -> None:
    model = random_model(kind)
    blocks = blocks_of(model)
    name, block = next(iter(blocks.items()))
    flow = enter(model, {name: block}, torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0)))
    here, needs = BlockRun(block, name, flow, CPU), frozenset({OutputResidualCovariance})
    found = [
        layer
        for layer, linear in linears_of(block).items()
        if measure(here, {layer: linear}, needs, here)[layer].get(OutputResidualCovariance) is not None
    ]
    assert found == [ADDED[kind]]
    together = measure(here, linears_of(block), needs, here)
    assert all(stats.get(OutputResidualCovariance) is None for stats in together.values())
    # What compares with the layer's own inputs in the original model is measured for the others alone.
    for layer, linear in linears_of(block).items():
        stats = measure(here, {layer: linear}, needs | {CrossCovariance}, here)[layer]
        assert (stats.get(CrossCovariance) is None) == (layer == ADDED[kind])


def test_output_residuals_are_what_the_block_lacks_of_the_original_against_the_layer_s_inputs() -> None:
    model = random_model("llama")
    name, block = next(iter(blocks_of(model).items()))
    flow = enter(model, {name: block}, torch.randint(256, (3, 24), generator=torch.Generator().manual_seed(0)))
    twin = copy.deepcopy(block)
    with torch.no_grad():
        block.get_parameter("mlp.gate_proj.weight").mul_(0.9)
        block.get_parameter("self_attn.o_proj.weight").mul_(1.1)
    linear = block.get_submodule("mlp.down_proj")
    here, original = BlockRun(block, name, flow, CPU), BlockRun(twin, name, flow, CPU)
    found = measure(here, {"mlp.down_proj": linear}, frozenset({OutputResidualCovariance}), original)["mlp.down_proj"]
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours, theirs = torch.cat(list(run(here))), torch.cat(list(run(original)))
    handle.remove()
    lacking, inputs = (theirs - ours).flatten(0, 1).double(), torch.cat(seen).flatten(0, 1).double()
    # float32 sums of 72 products
    torch.testing.assert_close(
        found[OutputResidualCovariance], (lacking.T @ inputs / len(inputs)).float(), rtol=1e-4, atol=1e-6
    )
