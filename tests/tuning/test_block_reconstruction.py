"""ReconstructionOptions a block never makes it worse, keeps masks and grids, and touches nothing else."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from slimlm.calibration.capture import BlockRun, enter, run
from slimlm.core import grid
from slimlm.core.errors import DataError, RecipeError
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part
from slimlm.core.parts.codebook import Codebook, nearest_value
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.trainable import EVERYTHING, Trains
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.scale_search import search_scales
from slimlm.models.structure import blocks_of, linears_of, swap, weight_of
from slimlm.recipe import ReconstructionOptions
from slimlm.runtime.linear import CompressedLinear
from slimlm.tuning import block_reconstruction
from slimlm.tuning.block_reconstruction import ReconstructionResult, tune_block
from tests.conftest import random_model

CPU = torch.device("cpu")
QUICK = ReconstructionOptions(passes=2, rate=0.02, batch=4, codes="frozen")
LEVELS = torch.tensor([-1.0, -0.7, -0.5, -0.3, -0.1, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, -1.3, 1.5, -1.6, 0.1]).half()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(weight: Tensor, group_size: grid.GroupSize, bits: int = 4) -> Uniform:
    scale = grid.storable(search_scales(weight, bits=bits, group_size=group_size))
    return Uniform(grid.encode(weight, scale, bits=bits, group_size=group_size), scale, bits, group_size)


def codebook(weight: Tensor, group_size: int = 16) -> Codebook:
    scale = (
        (grid.scale_sets(weight, group_size).abs().amax(dim=1) / 1.6)
        .view(grid.scale_shape(tuple(weight.shape), group_size))
        .half()
    )
    index = nearest_value(weight / grid.spread(scale, weight.shape[1], group_size), LEVELS.float())
    return Codebook(index.to(torch.uint8), LEVELS, scale, 4, group_size)


def parts_for(kind: str, weight: Tensor) -> tuple[Part, ...]:
    """Parts that stand roughly for a weight `[out, in]`."""
    keep = choose(weight.abs(), Pattern.parse("2:4"))
    left, right = draw(4, weight.shape[0], seed=1) / 10, draw(4, weight.shape[1], seed=2) / 10
    half = LowRank(Plain(left.half()), Plain(right.half()))
    if kind == "uniform":
        return (uniform(weight, 16), half)
    if kind == "input-scales":
        scale = (0.5 + torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(3))).half()
        return (replace(uniform(weight / scale.float(), "per-channel"), channel_scale=scale),)
    if kind == "slim":
        return (Pruned(uniform(weight * keep, "per-tensor"), keep, "2:4"), LowRank(uniform(left, 32), uniform(right, 32, 8)))
    if kind == "pruned-codebook":
        return (Pruned(codebook(weight * keep), keep, "2:4"), LowRank(codebook(left), codebook(right)))
    assert kind == "pruned-plain"
    return (Pruned(Plain((weight * keep).bfloat16()), keep, "2:4"), half)


KINDS = ["uniform", "input-scales", "slim", "pruned-codebook", "pruned-plain"]


class Case:
    """The first block of a tiny model, compressed, with its inputs and the dense block's outputs."""

    def __init__(self, family: str = "llama", kind: str = "slim", count: int = 16, dtype: torch.dtype = torch.float16) -> None:
        self.model = random_model(family)
        self.dtypes = dict.fromkeys(self.model.state_dict(), dtype)
        for tensor in self.model.state_dict().values():
            tensor.copy_(tensor.to(dtype))
        blocks = blocks_of(self.model)
        self.name, self.block = next(iter(blocks.items()))
        rows = torch.randint(256, (count, 16), generator=torch.Generator().manual_seed(5))
        self.flow = enter(self.model, blocks, rows)
        self.targets = list(run(BlockRun(self.block, self.name, self.flow, CPU)))
        for name, linear in linears_of(self.block).items():
            parts = parts_for(kind, weight_of(linear).float())
            swap(self.block, name, CompressedLinear.from_parts(Parts(*parts), dict(linear.named_parameters()).get("bias")))

    def match(self, options: ReconstructionOptions = QUICK) -> ReconstructionResult:
        return tune_block(self.block, self.name, self.flow, self.targets, options, self.dtypes, CPU)

    def layers(self) -> dict[str, CompressedLinear]:
        return {name: m for name, m in self.block.named_modules() if isinstance(m, CompressedLinear)}

    def held_loss(self, share: float) -> float:
        """The loss on the windows held back, computed another way: the whole block, then the rows."""
        outputs = torch.cat(list(run(BlockRun(self.block, self.name, self.flow, CPU)))).double()
        target = torch.cat(self.targets).double()
        _, held = block_reconstruction._Samples(self.name, self.flow, self.targets, CPU).divided(share)
        starts = torch.tensor([0, *(len(t) for t in self.targets)]).cumsum(0)
        rows = torch.cat([starts[batch] + rows for batch, rows in held])
        return float((outputs - target)[rows].square().sum() / target[rows].square().sum())


def grids(part: Part) -> list[Elementwise]:
    if isinstance(part, Pruned):
        return grids(part.inner)
    if isinstance(part, LowRank):
        return [*grids(part.left), *grids(part.right)]
    assert isinstance(part, Plain | Uniform | Codebook)
    return [part]


@pytest.mark.parametrize("codes", ["frozen", "ste"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbed_block_comes_closer_and_the_loss_reported_is_that_of_the_block(kind: str, codes: str) -> None:  # law 26
    case = Case(kind=kind)
    with torch.no_grad():
        for seed, name in enumerate(["input_layernorm.weight", "post_attention_layernorm.weight"]):
            case.block.get_parameter(name).mul_(1 + 0.3 * draw(48, seed=seed)).copy_(case.block.get_parameter(name).half())
    before = case.held_loss(QUICK.held_back)
    matched = case.match(replace(QUICK, codes=codes))
    # the loss is summed in float32 over another cut of the windows
    assert matched.before == pytest.approx(before, rel=1e-4)
    assert matched.after == pytest.approx(case.held_loss(QUICK.held_back), rel=1e-4)
    assert matched.after < 0.98 * matched.before and matched.best_pass > 0


@pytest.mark.parametrize("rate", [0.001, 0.3, 0.99])
def test_held_back_loss_never_rises_at_any_rate(rate: float) -> None:  # law 27
    case = Case()
    matched = case.match(replace(QUICK, rate=rate, codes="ste"))
    assert matched.after <= matched.before
    assert case.held_loss(QUICK.held_back) <= matched.before * (1 + 1e-4)


@pytest.mark.parametrize("codes", ["frozen", "ste"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_formats_and_sizes_stay_and_every_code_is_on_its_grid(kind: str, codes: str) -> None:  # law 27
    case = Case(kind=kind)
    before = {name: layer.parts() for name, layer in case.layers().items()}
    case.match(replace(QUICK, codes=codes))
    for name, layer in case.layers().items():
        assert layer.parts().describe() == before[name].describe()
        assert [p.storage_bits() for p in layer.parts()] == [p.storage_bits() for p in before[name]]
        for old, new in zip(before[name], layer.parts(), strict=True):
            if isinstance(old, Pruned):
                assert isinstance(new, Pruned) and torch.equal(new.mask, old.mask)
                assert not new.dense()[~old.mask].any()
            for was, now in zip(grids(old), grids(new), strict=True):
                assert all(t.isfinite().all() for t in now.tensors().values())
                if isinstance(now, Uniform) and isinstance(was, Uniform):
                    top = grid.top_code(now.bits)
                    assert -top - 1 <= int(now.codes.min()) and int(now.codes.max()) <= top
                    assert now.scale.dtype == was.scale.dtype and bool((now.scale > 0).all())
                    assert (now.channel_scale is None) == (was.channel_scale is None)
                    assert now.channel_scale is None or torch.equal(now.channel_scale, was.channel_scale)
                if isinstance(now, Codebook) and isinstance(was, Codebook):
                    assert now.values.dtype == torch.float16 and torch.equal(now.values == 0, was.values == 0)


@pytest.mark.parametrize("kind", ["slim", "pruned-codebook"])
def test_frozen_codes_of_the_base_stay_and_ste_moves_some(kind: str) -> None:
    def codes(case: Case) -> list[Tensor]:
        bases = [grids(layer.parts().base)[0] for layer in case.layers().values()]
        return [b.codes if isinstance(b, Uniform) else b.index for b in bases if isinstance(b, Uniform | Codebook)]

    case, other = Case(kind=kind), Case(kind=kind)
    before = codes(case)
    case.match()
    other.match(replace(QUICK, codes="ste", rate=0.05, passes=4))
    assert all(torch.equal(a, b) for a, b in zip(codes(case), before, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(codes(other), before, strict=True))


def test_norms_and_biases_move_and_are_kept_as_they_will_be_stored(family: str) -> None:
    case = Case(family, dtype=torch.bfloat16)
    vectors = {name: p.detach().clone() for name, p in case.block.named_parameters() if p.ndim == 1}
    assert case.match().best_pass > 0
    moved = {name: p.detach() for name, p in case.block.named_parameters() if p.ndim == 1}
    assert vectors.keys() == moved.keys()
    for name, value in moved.items():
        assert not torch.equal(value, vectors[name]), name
        assert torch.equal(value, value.bfloat16().float()), name


def test_nothing_outside_the_block_changes_nor_what_it_was_given_nor_the_random_state() -> None:
    case = Case()
    inside = set(case.block.state_dict())
    outside = {n: t.clone() for n, t in case.model.state_dict().items() if n.removeprefix(case.name + ".") not in inside}
    given = copy.deepcopy((case.flow, case.targets))
    flags = {name: p.requires_grad for name, p in case.model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    case.match()
    assert torch.equal(torch.get_rng_state(), state)
    assert outside and all(torch.equal(case.model.state_dict()[name], tensor) for name, tensor in outside.items())
    assert all(torch.equal(a, b) for a, b in zip(case.flow.hidden + case.targets, given[0].hidden + given[1], strict=True))
    assert {name: p.requires_grad for name, p in case.model.named_parameters() if p.requires_grad} == {
        name: flag for name, flag in flags.items() if flag
    }
    assert all(p.grad is None for p in case.model.parameters())


def test_the_same_block_is_matched_the_same_way_twice_also_without_gradients() -> None:
    one, other = Case(), Case()
    first = one.match(replace(QUICK, codes="ste"))
    torch.manual_seed(99)
    with torch.no_grad():
        assert other.match(replace(QUICK, codes="ste")) == first
    theirs = other.block.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.block.state_dict().items())


def test_the_cut_of_a_batch_gives_the_rows_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimlm.calibration.capture.TOKENS_AT_ONCE", 4 * 16)
    case = Case(family, count=10)  # batches of 4, 4 and 2
    assert [len(h) for h in case.flow.hidden] == [4, 4, 2]
    windows = block_reconstruction._Samples(
        case.name, case.flow, list(run(BlockRun(case.block, case.name, case.flow, CPU))), CPU
    )
    form = block_reconstruction._Form.of(case.block)
    with torch.no_grad():
        for step in [(0, torch.tensor([2])), (1, torch.tensor([3, 0, 1])), (2, torch.tensor([1]))]:
            error, energy = windows.error(case.block, form, step)
            assert float(error / energy) < 1e-10  # a matrix product's order of summation may change with its rows


def test_a_block_without_damage_stays_untouched() -> None:
    case = Case()
    case.targets = list(run(BlockRun(case.block, case.name, case.flow, CPU)))
    layers = case.layers()
    matched = case.match(replace(QUICK, held_back=0.5))
    assert matched.after <= matched.before < 1e-10
    assert matched.best_pass > 0 or case.layers() == layers


class _BrokenError(RuntimeError):
    pass


def test_an_exception_leaves_a_block_that_works_and_is_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    before = case.held_loss(QUICK.held_back)
    whole = block_reconstruction._Samples.error
    calls = iter(range(1000))

    def failing(*args: object) -> tuple[Tensor, Tensor]:
        if next(calls) == 8:
            raise _BrokenError
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(block_reconstruction._Samples, "error", failing)
    with pytest.raises(_BrokenError):
        case.match()
    assert len(case.layers()) == 7 and not any(p.grad_fn for p in case.block.parameters())
    assert case.held_loss(QUICK.held_back) <= before * (1 + 1e-4)


def test_targets_that_are_no_numbers_leave_the_block_as_it_was() -> None:
    case = Case()
    layers, state = case.layers(), {n: t.clone() for n, t in case.block.state_dict().items()}
    case.targets = [t * float("nan") for t in case.targets]
    assert case.match().best_pass == 0
    assert case.layers() == layers
    assert all(torch.equal(tensor, state[name]) for name, tensor in case.block.state_dict().items())


def test_layers_that_were_left_dense_stay_and_so_does_a_block_of_them() -> None:
    case = Case()
    dense = nn.Linear(48, 88)
    swap(case.block, "mlp.up_proj", dense)
    before = copy.deepcopy(dense.state_dict())
    assert case.match().best_pass > 0
    assert case.block.get_submodule("mlp.up_proj") is dense
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())

    untouched = random_model("llama")
    block = next(iter(blocks_of(untouched).values()))
    state = {n: t.clone() for n, t in block.state_dict().items()}
    matched = tune_block(block, case.name, case.flow, case.targets, QUICK, case.dtypes, CPU)
    assert matched.best_pass == 0 and matched.before == matched.after
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("kind", ["uniform", "codebook"])
def test_the_gradient_through_a_quantized_factor_is_that_of_the_plain_one(kind: str) -> None:  # law 26
    factor = draw(4, 32) / 10
    part = uniform(factor, 16) if kind == "uniform" else codebook(factor)
    other = draw(4, 24, seed=1)
    tuned = part.trainable(EVERYTHING)
    plain = part.dense().requires_grad_()
    assert torch.equal(tuned.dense(), plain)
    (expected,) = torch.autograd.grad(((other.T @ plain) ** 3).sum(), plain)
    latent = tuned.codes if kind == "uniform" else tuned.latent
    (found,) = torch.autograd.grad(((other.T @ tuned.dense()) ** 3).sum(), latent)
    # latent codes are in units of the scale
    assert torch.allclose(found, expected * grid.spread(part.scale, 32, 16), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moving", [False, True])
def test_parts_that_were_not_tuned_are_stored_as_they_were(kind: str, moving: bool) -> None:
    for part in parts_for(kind, draw(24, 48) / 10):
        tuned = part.trainable(EVERYTHING if moving else ~Trains.CODES)
        assert torch.allclose(tuned.dense(), part.dense(), rtol=1e-6)
        assert torch.equal(tuned.part().dense(), part.dense())


def test_a_scale_in_float16_stays_one_and_a_scale_of_zero_stays_zero() -> None:
    scale = torch.tensor([[0.0, 1e-4], [0.1, 3e4]]).half()
    tuned = Uniform(torch.ones(2, 4, dtype=torch.int8), scale, 4, 2).trainable(~Trains.CODES)
    for factor in (1e-6, -3.0, 1e6):
        with torch.no_grad():
            tuned.scale.factor.fill_(factor)
        part = tuned.part()
        assert isinstance(part, Uniform) and part.scale.dtype == torch.float16
        assert part.scale[0, 0] == 0 and bool((part.scale.flatten()[1:] > 0).all()) and bool(part.scale.isfinite().all())


def test_the_nearest_level_is_found_in_any_order() -> None:
    levels, values = LEVELS.float(), draw(9, 11)
    found = nearest_value(values, levels)
    assert torch.equal((levels[found] - values).abs(), (levels - values[..., None]).abs().amin(dim=-1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passes": 0}, "passes = 0"),
        ({"rate": 0.0}, "rate = 0"),
        ({"rate": 1.5}, "rate = 1.5"),
        ({"codes": "free"}, "codes = 'free'"),
        ({"held_back": 0.0}, "held_back = 0"),
        ({"held_back": 1.0}, "held_back = 1"),
        ({"inputs": "both"}, "inputs = 'both'"),
        ({"batch": 0}, "batch = 0"),
    ],
)
def test_senseless_options_are_refused_in_words(options: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ReconstructionOptions(**options)  # type: ignore[arg-type]


def test_a_single_window_is_refused_and_two_are_enough() -> None:
    with pytest.raises(DataError, match="at least two calibration samples"):
        Case(count=1).match()
    assert Case(count=2).match().after > 0
