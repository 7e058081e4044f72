"""What every method owes, whoever wrote it. A method joins this suite by existing."""

import dataclasses
import importlib
import inspect
from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from slimlm.core import registry
from slimlm.core.layer import Layer
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.core.statistics.base import Stats
from slimlm.core.step import Step
from tests.methods.conftest import inputs, layer_of, stats_of

Name = tuple[str, str]
METHODS: list[Name] = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
SHAPES = [(48, 172), (96, 352), (172, 48), (7, 12), (1, 4)]
"""Groups of 128 divide none of these widths; 96 x 352 is searched by histogram; 7 x 12 has rank 0 at the default 0.1."""
SMALL = (16, 36)
"""Groups of 32 divide neither side; with two tokens and more for each input covariances are taken as they are."""

REPRESENTATIVES = {
    "quantize": ("slim_quant", "gptq"),
    "prune": ("wanda", "sparsegpt"),
    "compensate": ("slim_lora", "qera"),
    "joint": ("alternation",),
}

every_method = pytest.mark.parametrize(("kind", "name"), METHODS, ids=[name for _, name in METHODS])


def moves_coded(kinds: tuple[str, ...], chosen: dict[str, str]) -> bool:
    """Whether a pruner would move weights that are coded already, which a recipe refuses."""
    moving = "prune" in chosen and default("prune", chosen["prune"]).moves_weights
    return moving and "quantize" in kinds[: kinds.index("prune")]


def orders() -> list[tuple[Name, ...]]:
    """All methods of one, two or three different verbs in every order, and the verbs of the recipe `slim`."""
    verbs = [kinds for length in (1, 2, 3) for kinds in permutations(registry.KINDS, length)]
    verbs.append(("quantize", "prune", "compensate", "quantize", "compensate"))
    # A joint solver chooses the mask itself; a recipe that prunes, too, is refused.
    verbs = [kinds for kinds in verbs if not {"prune", "joint"} <= set(kinds)]
    found = []
    for kinds in verbs:
        kinds_once = list(dict.fromkeys(kinds))
        # Every pair of methods meets in both orders; of three and more verbs a representative of each kind is enough.
        choices = [registry.names(kind) if len(kinds) < 3 else REPRESENTATIVES[kind] for kind in kinds_once]
        for names in product(*choices):
            chosen = dict(zip(kinds_once, names, strict=True))
            if moves_coded(kinds, chosen):
                continue
            found.append(tuple((kind, chosen[kind]) for kind in kinds))
    return found


def default(kind: str, name: str) -> Step:
    return registry.find(kind, name)()


def brief(kind: str, name: str) -> Step:
    """As by default, in few rounds."""
    return default(kind, name).brief()


def started(kind: str, layer: Layer, stats: Stats) -> Layer:
    """The layer as a method of this kind usually meets it: a compensator after something to repair."""
    if kind != "compensate":
        return layer
    return default("prune", "magnitude")(default("quantize", "absmax")(layer, stats), stats)


def tensors_of(layer: Layer) -> dict[str, Tensor]:
    return {f"{i}_{name}": t for i, part in enumerate(layer.parts()) for name, t in part.tensors().items()}


def assert_sound(layer: Layer) -> None:
    """Finite, masked, of the right shape, and the same after storage."""
    parts = layer.parts()
    dense = parts.dense()
    assert dense.shape == layer.original.shape
    assert bool(dense.isfinite().all())
    if layer.mask is not None:  # law 8
        assert int((parts.base.dense()[~layer.mask] != 0).sum()) == 0
    packed = parts.tensors()
    back = parts.describe().from_stored(packed, layer.shape)
    assert torch.equal(back.dense(), dense)  # law 23
    again = back.tensors()
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[name], packed[name]) for name in packed)
    stored = sum(8 * len(t.contiguous().view(torch.uint8).flatten()) for t in packed.values())
    assert parts.storage_bits() == stored  # law 29


@every_method
def test_the_defaults_work_and_the_options_are_fields(kind: str, name: str) -> None:
    method = registry.find(kind, name)
    step = method()
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert step.needs <= set(registry.statistics())
    assert "needs" not in {field.name for field in dataclasses.fields(method)}
    assert step == dataclasses.replace(step)


@every_method
def test_the_class_says_in_one_line_what_it_gives(kind: str, name: str) -> None:
    text = inspect.getdoc(registry.find(kind, name))
    assert text and not text.startswith(registry.find(kind, name).__name__ + "("), "a docstring of its own"
    summary = text.splitlines()[0]
    assert summary.endswith(".")
    assert 10 < len(summary) <= 100  # a row of the table of methods


@every_method
def test_the_file_names_its_paper_or_says_that_it_is_a_baseline(kind: str, name: str) -> None:
    text = importlib.import_module(f"slimlm.methods.{kind}.{name}").__doc__ or ""
    assert "arXiv" in text or "baseline" in text


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_result_is_sound_for_any_shape(kind: str, name: str, shape: tuple[int, int]) -> None:
    stats = stats_of(inputs(shape[1]))
    layer = default(kind, name)(started(kind, layer_of(*shape), stats), stats)
    assert_sound(layer)


@every_method
def test_no_argument_is_changed(kind: str, name: str) -> None:
    stats = stats_of(inputs(SMALL[1]))
    layer = started(kind, layer_of(*SMALL), stats)
    weight, before = layer.original.clone(), {n: t.clone() for n, t in tensors_of(layer).items()}
    measured = {statistic: tensor.clone() for statistic, tensor in stats.values.items() if tensor is not None}
    after = default(kind, name)(layer, stats)
    assert torch.equal(layer.original, weight)
    assert torch.equal(after.original, weight)
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(layer).items())
    assert all(torch.equal(stats[statistic], t) for statistic, t in measured.items())


@every_method
def test_the_same_call_gives_the_same_bits(kind: str, name: str) -> None:  # law 28
    stats = stats_of(inputs(SMALL[1]))
    first, second = (default(kind, name)(started(kind, layer_of(*SMALL), stats), stats) for _ in range(2))
    assert all(torch.equal(t, tensors_of(second)[n]) for n, t in tensors_of(first).items())


@every_method
def test_the_random_state_is_left_alone(kind: str, name: str) -> None:
    stats = stats_of(inputs(SMALL[1]))
    layer = started(kind, layer_of(*SMALL), stats)
    before = torch.random.get_rng_state()
    default(kind, name)(layer, stats)
    assert torch.equal(torch.random.get_rng_state(), before)


@every_method
def test_a_method_reads_no_statistic_that_it_did_not_ask_for(kind: str, name: str) -> None:
    full = stats_of(inputs(SMALL[1]))
    step = default(kind, name)
    only = full.restricted_to(step.needs)
    assert only.values.keys() == step.needs
    layer = started(kind, layer_of(*SMALL), full)
    with_all, with_its_own = tensors_of(step(layer, full)), tensors_of(step(layer, only))
    assert all(torch.equal(t, with_all[n]) for n, t in with_its_own.items())


@every_method
@pytest.mark.parametrize("dead", [5, SMALL[1]], ids=["some", "all"])
def test_inputs_that_never_fire_do_no_harm(kind: str, name: str, dead: int) -> None:
    stats = stats_of(inputs(SMALL[1], dead=dead))
    layer = default(kind, name)(started(kind, layer_of(*SMALL), stats), stats)
    assert_sound(layer)
    # A dead input may lose its repair, but no weight may come out larger than it and its rounding can explain.
    assert float(layer.parts().dense().abs().max()) <= 2 * float(layer.original.abs().max())


@every_method
def test_a_weight_of_zeros_stays_zero(kind: str, name: str) -> None:
    stats = stats_of(inputs(SMALL[1]))
    zero = Layer.of("fc1", torch.zeros(*SMALL, dtype=torch.float16))
    layer = default(kind, name)(started(kind, zero, stats), stats)
    assert_sound(layer)
    assert int((layer.parts().dense() != 0).sum()) == 0


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_other_dtypes_are_taken(kind: str, name: str, dtype: torch.dtype) -> None:
    stats = stats_of(inputs(SMALL[1]))
    layer = Layer.of("fc1", layer_of(*SMALL).original.to(dtype))
    assert_sound(default(kind, name)(started(kind, layer, stats), stats))


@pytest.mark.parametrize("names", orders(), ids=lambda names: "-".join(name for _, name in names))
def test_methods_work_in_every_order(names: tuple[Name, ...]) -> None:
    stats = stats_of(inputs(SMALL[1], dead=3))
    layer = layer_of(*SMALL)
    masks: list[Tensor] = []
    for kind, name in names:
        layer = brief(kind, name)(layer, stats)
        masks += [] if layer.mask is None else [layer.mask]
    assert_sound(layer)
    assert all(torch.equal(mask, masks[0]) for mask in masks)  # no later step touches the mask
    kinds = {kind for kind, _ in names}
    base = layer.parts().base
    # A joint solver leaves codes, and a mask where it has a pattern.
    assert isinstance(base, Pruned) == any(default(kind, name).sparsity is not None for kind, name in names)
    coded = isinstance(base.inner if isinstance(base, Pruned) else base, Uniform | Codebook)
    assert coded == bool({"quantize", "joint"} & kinds)
    # 2:4 by magnitude drops a tenth of the energy or so, 4 bits less; half would mean that something undoes another.
    assert float(layer.error.square().sum()) < 0.5 * float(layer.original.square().sum())
