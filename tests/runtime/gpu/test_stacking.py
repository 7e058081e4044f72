"""Layers that share their input in one launch: each gives what it gives alone, and lies in memory once."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from slimlm.core.parts.base import Part
from slimlm.core.parts.pack import Parts
from slimlm.inference.decode.grouped import grouped_call
from slimlm.runtime.backends.triton import Gpu, StackedLayers
from slimlm.runtime.gpu import layout, stacking, tiles
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import describe
from tests.runtime.gpu.layers import (
    ERRORS,
    REASON,
    WHERE,
    WIDTH,
    adapter,
    codes,
    draw,
    error,
    exact,
    half_kept,
    layer,
    pruned,
    table,
    with_zeros,
)

interpreted = pytest.mark.skipif(REASON is not None, reason=f"no GPU kernels: {REASON}")

OUTS = (70, 130, 64)
"""Heights of q, k and v that fill up differently: 128, 192 and 64 rows."""


def trios(outs: Sequence[int] = OUTS, width: int = WIDTH) -> dict[str, list[tuple[Part, ...]]]:
    """Layers of one kind and all their own values: scales, tables, ranks (5, 70 and 3: one and two blocks)."""
    ranks = (5, 70, 3)
    numbered = list(enumerate(zip(outs, ranks, strict=True)))
    return {
        "2:4 one scale": [(pruned(codes((out, width), "per-tensor", seed=i)),) for i, (out, _) in numbered],
        "2:4 groups of 32 + adapters": [
            (pruned(codes((out, width), 32, seed=i)), adapter("groups", out, width, rank)) for i, (out, rank) in numbered
        ],
        "2:4 tables + adapters of tables": [
            (pruned(table((out, width), 32, seed=i, power=2 * i + 1)), adapter("tables", out, width, rank))
            for i, (out, rank) in numbered
        ],
        "groups of 128 + plain adapters": [
            (codes((out, width), 128, seed=i), adapter("plain", out, width, rank)) for i, (out, rank) in numbered
        ],
        "zeros, groups of 64": [(with_zeros(codes((out, width), 64, seed=i), seed=i),) for i, (out, _) in numbered],
        "zeros + adapters": [
            (with_zeros(codes((out, width), 128, seed=i)), adapter("groups", out, width, rank)) for i, (out, rank) in numbered
        ],
        "zeros of rows": [(with_zeros(codes((out, width), "per-channel", seed=i), seed=i),) for i, (out, _) in numbered],
        "rows + adapters of rows": [
            (codes((out, width), "per-channel", seed=i), adapter("rows", out, width, rank)) for i, (out, rank) in numbered
        ],
    }


def built(parts: Sequence[tuple[Part, ...]], *, bias: bool = True) -> list[CompressedLinear]:
    layers = [layer(own, bias=bias) for own in parts]
    for one in layers:
        one.use_kernels("gpu")
    return layers


@interpreted
@pytest.mark.parametrize("name", trios())
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float16, 1), (torch.bfloat16, 9)], ids=str)
def test_each_output_is_that_of_the_dense_matrix(name: str, dtype: torch.dtype, batch: int) -> None:  # law 25
    parts, x = trios()[name], draw(batch, WIDTH, seed=4).to(dtype)
    together = grouped_call(built(parts))
    assert isinstance(together, StackedLayers)
    for own, y in zip(parts, together(x.to(WHERE)), strict=True):
        assert y.dtype == dtype and error(y, exact(own, x)) < ERRORS[dtype]


@interpreted
@pytest.mark.parametrize("name", ["2:4 tables + adapters of tables", "groups of 128 + plain adapters", "zeros, groups of 64"])
def test_a_piece_multiplies_as_it_did_before_it_was_one(name: str) -> None:  # law 25
    x = draw(2, WIDTH, seed=4).to(WHERE, torch.float16)
    layers = built(trios()[name])
    before = [one(x) for one in layers]
    grouped_call(layers)
    assert all(torch.equal(one(x), y) for one, y in zip(layers, before, strict=True))
    wide = x.float()
    for own, one in zip(trios()[name], layers, strict=True):
        assert error(one(wide), exact(own, wide.cpu())) < ERRORS[torch.float32]


@interpreted
def test_all_inputs_that_one_launch_does_not_take_go_through_the_layers_by_themselves() -> None:
    parts = trios()["2:4 groups of 32 + adapters"]
    together = grouped_call(built(parts))
    many, wide = draw(tiles.FUSED_UP_TO + 1, WIDTH).to(WHERE, torch.float16), draw(2, WIDTH).to(WHERE)
    for x in (many, wide):
        for own, y in zip(parts, together(x), strict=True):
            assert error(y, exact(own, x.cpu())) < ERRORS[x.dtype]
    learning = draw(1, WIDTH).to(WHERE, torch.float16).requires_grad_()
    sum(y.float().sum() for y in together(learning)).backward()
    assert learning.grad is not None and bool(learning.grad.any())
    assert [y.shape for y in together(draw(0, WIDTH).to(WHERE, torch.float16))] == [(0, out) for out in OUTS]


@interpreted
def test_only_some_have_a_bias() -> None:
    parts = trios()["2:4 one scale"]
    layers = [layer(own, bias=i == 1) for i, own in enumerate(parts)]
    x = draw(1, WIDTH, seed=4).half()
    for i, (own, y) in enumerate(
        zip(parts, StackedLayers([Gpu().prepare(one.stored()) for one in layers])(x.to(WHERE)), strict=True)
    ):
        assert error(y, exact(own, x, bias=i == 1)) < ERRORS[torch.float16]


@interpreted
def test_joined_layers_lie_in_memory_once_and_are_joined_once() -> None:
    layers = built(trios()["2:4 groups of 32 + adapters"])
    one = grouped_call(layers)
    assert isinstance(one, StackedLayers)
    places = {own.prepared().layer.base.words.untyped_storage().data_ptr() for own in layers}
    assert places == {one.stack.base.words.untyped_storage().data_ptr()}
    again = grouped_call(layers)
    assert isinstance(again, StackedLayers) and again.stack is one.stack
    fewer = grouped_call(layers[:2])
    assert isinstance(fewer, StackedLayers) and len(fewer.stack.layers) == 2, "two of three are a weight of their own"
    grouped_call(layers)
    model = nn.ModuleList(layers)
    assert "3 of them, which share inputs, in 1 launches" in str(describe(model))


@interpreted
@pytest.mark.parametrize("name", ["2:4 groups of 32 + adapters", "zeros + adapters"])
def test_the_operation_is_well_behaved(name: str) -> None:
    ready = [Gpu().prepare(one.stored()) for one in built(trios()[name])]
    own = StackedLayers(ready).stack
    assert own.tail is not None and own.tail.packed is not None and isinstance(own.right, layout.Packed)
    x = draw(2, 1, WIDTH).to(WHERE, torch.float16)
    t = draw(2, 1, own.right.rows).to(WHERE, torch.float16)
    tail = own.tail.packed
    arguments: tuple[Any, ...] = (x, own.base.words, own.base.scale, None, None, t, tail.words, tail.scale, None, own.members)
    arguments += (own.counters, own.base.rows, WIDTH, own.step, own.base.zero)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.slimlm.gpu_stacked_product.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("others", "words_"),
    [
        ((codes((24, 48), 8),), "their bases are of different kinds"),
        ((pruned(codes((24, 48), "per-channel", inputs=True)),), "inputs of one of them are scaled"),
        ((pruned(table((24, 48), "per-channel")),), "their bases are of different kinds"),
        ((pruned(codes((24, 48), 32)),), "their bases are of different kinds"),
        ((half_kept(codes((24, 48), "per-channel")),), "their bases are of different kinds"),
        ((pruned(codes((24, 44), "per-channel")),), "their bases are of different kinds"),
        ((pruned(codes((24, 48), "per-channel")), adapter("rows", 24, 48)), "their first factors are of different kinds"),
    ],
)
def test_layers_of_different_kinds_stay_apart_for_a_reason(others: tuple[Part, ...], words_: str) -> None:
    parts = ((pruned(codes((24, 48), "per-channel")),), others)
    ready = [layout.lay_out(CompressedLinear.from_parts(Parts(*own), None).stored()) for own in parts]
    assert stacking.refuses(ready) == words_


def test_second_factors_of_different_kinds_are_the_reason() -> None:
    base = pruned(codes((24, 48), "per-channel"))
    ready = [
        layout.lay_out(CompressedLinear.from_parts(Parts(base, adapter(k, 24, 48)), None).stored()) for k in ("groups", "mixed")
    ]
    assert stacking.refuses(ready) == "their second factors are of different kinds"


def test_one_scale_and_scales_of_rows_are_one_kind() -> None:
    parts = [pruned(codes((24, 48), "per-channel")), pruned(codes((130, 48), "per-tensor"))]
    own = stacking.stack([layout.lay_out(CompressedLinear.from_parts(Parts(part), None).stored()) for part in parts])
    assert own.base.scale.shape == (64 + 192,) and own.step == 64 and own.rows == (slice(0, 24), slice(64, 194))
    assert own.members[:, 3].tolist() == [0, 64, 64, 64]


def test_a_width_of_whole_tiles_lets_tiles_be_tall() -> None:
    parts = [pruned(codes((128, 48), "per-channel")), pruned(codes((256, 48), "per-channel"))]
    assert (
        stacking.stack([layout.lay_out(CompressedLinear.from_parts(Parts(part), None).stored()) for part in parts]).step == 128
    )
