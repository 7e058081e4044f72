"""Calibration: what is measured, on which inputs, and how often."""

import dataclasses

import pytest
import torch
from torch import nn

from slimlm import calibrate
from slimlm.calibrate import Flow, enter, measure, run
from slimlm.core.errors import ModelError, NumericsError
from slimlm.core.layer import Need
from slimlm.models.structure import blocks_of, linears_of

from .conftest import random_model

CPU = torch.device("cpu")
EVERYTHING = Need.MEAN_ABS | Need.MEAN_SQUARE | Need.PEAK_MEAN_ABS | Need.PEAK_ABS | Need.MEAN_WINDOW


def windows(count: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(seed))


def first_block(family: str = "llama") -> tuple[nn.Module, dict[str, nn.Module], str]:
    model = random_model(family)
    blocks = blocks_of(model)
    return model, blocks, next(iter(blocks))


def test_statistics_equal_those_of_the_inputs_themselves() -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(3))
    stats = measure(blocks[name], name, linears_of(blocks[name]), flow, EVERYTHING, CPU)
    seen: list[torch.Tensor] = []
    handle = blocks[name].get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    list(run(blocks[name], name, flow, CPU))
    handle.remove()
    x = torch.cat(seen).double()  # [3, 32, in]
    found = stats["mlp.down_proj"]
    assert found.tokens == 96
    # sums run in float64; the means are rounded to float32
    assert torch.allclose(found.mean_abs.double(), x.abs().mean(dim=(0, 1)), rtol=1e-6)
    assert torch.allclose(found.mean_square.double(), x.square().mean(dim=(0, 1)), rtol=1e-6)
    assert torch.allclose(found.peak_mean_abs.double(), x.abs().mean(dim=1).amax(dim=0), rtol=1e-5)
    assert torch.equal(found.peak_abs.double(), x.abs().amax(dim=(0, 1)))
    assert torch.allclose(found.mean_window.double(), x.mean(dim=0), rtol=1e-6)


@pytest.mark.parametrize("family_name", ["llama", "opt"])  # OPT hands its fc layers [tokens, in], without windows
def test_the_cut_into_batches_and_their_order_do_not_matter(  # law 20
    monkeypatch: pytest.MonkeyPatch, family_name: str
) -> None:
    model, blocks, name = first_block(family_name)
    rows = windows(7)
    whole = measure(blocks[name], name, linears_of(blocks[name]), enter(model, blocks, rows), EVERYTHING, CPU)
    monkeypatch.setattr(calibrate, "_TOKENS_AT_ONCE", 96)
    pieces = measure(blocks[name], name, linears_of(blocks[name]), enter(model, blocks, rows.flip(0)), EVERYTHING, CPU)
    for layer, expected in whole.items():
        for field in dataclasses.fields(expected):
            one, other = getattr(expected, field.name), getattr(pieces[layer], field.name)
            if isinstance(one, torch.Tensor):
                # 1e-6: a position's mean may cancel to nearly nothing, and a batch of another size sums in another order.
                assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), (layer, field.name)
            else:
                assert one == other


def test_layers_with_one_input_share_one_measurement() -> None:
    model, blocks, name = first_block()
    stats = measure(blocks[name], name, linears_of(blocks[name]), enter(model, blocks, windows(2)), EVERYTHING, CPU)
    assert stats["self_attn.q_proj"] is stats["self_attn.k_proj"] is stats["self_attn.v_proj"]
    assert stats["mlp.gate_proj"] is stats["mlp.up_proj"]
    assert stats["mlp.gate_proj"] is not stats["mlp.down_proj"]


def test_only_what_is_needed_is_measured() -> None:
    model, blocks, name = first_block()
    stats = measure(blocks[name], name, linears_of(blocks[name]), enter(model, blocks, windows(2)), Need.MEAN_SQUARE, CPU)[
        "mlp.down_proj"
    ]
    assert stats.mean_square is not None
    assert stats.mean_abs is None
    assert stats.peak_mean_abs is None
    assert stats.peak_abs is None
    assert stats.mean_window is None


@pytest.mark.parametrize("need", [Need.PEAK_ABS, Need.MEAN_WINDOW])
@pytest.mark.parametrize("family_name", ["llama", "opt"])  # OPT hands its fc layers [tokens, in], without windows
def test_peaks_and_means_of_positions_need_no_other_statistic(need: Need, family_name: str) -> None:
    model, blocks, name = first_block(family_name)
    flow = enter(model, blocks, windows(3))
    whole = measure(blocks[name], name, linears_of(blocks[name]), flow, EVERYTHING, CPU)
    alone = measure(blocks[name], name, linears_of(blocks[name]), flow, need, CPU)
    for layer, stats in alone.items():
        found = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats) if getattr(stats, f.name) is not None}
        assert found.keys() == {"tokens", str(need.name).lower()}
        one = found[str(need.name).lower()]
        assert torch.equal(one, getattr(whole[layer], str(need.name).lower()))
        assert one.shape[:-1] == ((32,) if need is Need.MEAN_WINDOW else ())


def test_the_second_block_is_measured_on_the_changed_first_block_s_outputs() -> None:  # law 22
    model, blocks, name = first_block()
    rows = windows(2)
    flow = enter(model, blocks, rows)
    with torch.no_grad():
        blocks[name].get_submodule("mlp.down_proj").weight.mul_(0.5)
    second = list(blocks)[1]
    flow = Flow(list(run(blocks[name], name, flow, CPU)), flow.arguments)
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
    measure(blocks[name], name, linears_of(blocks[name]), enter(model, blocks, windows(2)), EVERYTHING, CPU)
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


@pytest.mark.parametrize("need", [Need.MEAN_SQUARE, Need.PEAK_ABS, Need.MEAN_WINDOW])
def test_inputs_that_overflow_name_the_layer(need: Need) -> None:
    model, blocks, name = first_block()
    flow = enter(model, blocks, windows(2))
    flow.hidden[0][0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        measure(blocks[name], name, linears_of(blocks[name]), flow, need, CPU)


def test_gpt2_s_transposed_layers_are_found() -> None:
    _, blocks, name = first_block("gpt2")
    assert set(linears_of(blocks[name])) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
