"""The CPU kernels multiply as the matrices that the parts stand for: every format, shape and batch, on every processor.

The law is the float64 product with `dense()`. Measured errors, as a share of the product's size, are about 5e-5 for
"precise" (16-bit activations) and 1e-2 for "fast" (8 bits); the bounds leave room for unlucky numbers, not for mistakes: a
weight in a wrong place is an error of the size of the product.
"""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import CheckpointError, KernelError
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.inference.decode import native_decoder
from slimlm.kernels import native
from slimlm.runtime.backends.cpu import pack, pack_sum, unfit
from slimlm.runtime.cpu import bindings
from slimlm.runtime.cpu.bindings import PackedProducts, Precision
from slimlm.runtime.linear import CompressedLinear
from tests.conftest import KERNEL_VARIANTS

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no CPU kernels here")

BOUND: dict[Precision, float] = {"precise": 1e-3, "fast": 3e-2}
GROUPS: tuple[grid.GroupSize, ...] = ("per-tensor", "per-channel", 4, 20, 32, 64, 96, 128)
SHAPES = ((33, 172), (50, 352), (16, 128), (7, 100))
SOURCES = Path(__file__).resolve().parents[3] / "csrc"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_scale(shape: tuple[int, int], group: grid.GroupSize, dtype: torch.dtype) -> Tensor:
    return (torch.rand(grid.scale_shape(shape, group)) * 0.02 + 0.01).to(dtype)


def uniform(
    shape: tuple[int, int],
    bits: int,
    group_size: grid.GroupSize,
    dtype: torch.dtype = torch.float16,
    *,
    scaled: bool = False,
    zeros: bool = False,
) -> Uniform:
    """Codes of the whole range, the smallest included; `scaled` puts a factor on each input, `zeros` a zero on each scale."""

    def drawn(sizes: tuple[int, int]) -> Tensor:
        return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), sizes, dtype=torch.int8)

    codes = drawn(shape)
    channel_scale = (torch.rand(shape[1]) + 0.5).half() if scaled else None
    zero = drawn(grid.scale_shape(shape, group_size)) if zeros else None
    return Uniform(codes, random_scale(shape, group_size, dtype), bits, group_size, channel_scale, zero)


def codebook(shape: tuple[int, int], bits: int, group_size: grid.GroupSize, *, zero: bool = False) -> Codebook:
    levels = torch.randn(2**bits).sort().values.half()
    if zero:
        levels[0] = 0
    index = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return Codebook(index, levels, random_scale(shape, group_size, torch.float16), bits, group_size)


def pruned(inner: Elementwise, pattern: str | float) -> Pruned:
    parsed = Pattern.parse(pattern)
    return Pruned(inner, choose(torch.rand(inner.shape), parsed), str(pattern))


def layer(parts: Sequence[Part], bias: Tensor | None = None) -> PackedProducts:
    """The parts as the kernels hold them."""
    return several([parts], [bias])


def several(layers: Sequence[Sequence[Part]], biases: Sequence[Tensor | None]) -> PackedProducts:
    blobs = [packed_sum(parts) for parts in layers]
    return PackedProducts(blobs, biases, [parts[0].shape[0] for parts in layers], layers[0][0].shape[1])


def packed_sum(parts: Sequence[Part]) -> Tensor:
    """Kernels take more low-rank parts than a layer has slots."""
    return pack_sum([(part.describe().kernel_layout(), part.tensors()) for part in parts], parts[0].shape)


def dense_sum(parts: Sequence[Part]) -> Tensor:
    return sum((part.dense() for part in parts[1:]), start=parts[0].dense())


def assert_near(y: Tensor, expected: Tensor, x: Tensor, weight: Tensor, precision: Precision, about: object) -> None:
    """All together within the bound, and each output within a few times what its row and its token let it err by."""
    bound = BOUND[precision]
    off = (y.double() - expected).abs()
    # What random numbers of these sizes would give: a token that a factor of rank 1 happens to miss gives much less.
    reach = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) / x.shape[1] ** 0.5
    size = expected.norm().maximum(reach.norm())
    assert off.norm() <= bound * size, f"{about}: {off.norm() / size:.2g}"
    assert (off <= 6 * bound * reach + 1e-30).all(), f"{about}: {(off / reach).max():.2g}"


def assert_law(parts: Sequence[Part], batches: Sequence[int], about: object = None, bias: Tensor | None = None) -> None:
    """The product of these parts at every batch size and both precisions."""
    packed, weight = layer(parts, bias), dense_sum(parts)
    x = torch.randn(max(batches), weight.shape[1])
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    for precision in BOUND:
        for batch in batches:
            [y] = packed(x[:batch], precision)
            assert y.shape == (batch, weight.shape[0])
            if batch:
                assert_near(y, expected[:batch], x[:batch], weight, precision, (about, batch, precision))


@pytest.mark.parametrize("pattern", ["dense", "2:4"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_an_even_grid_multiply_as_their_matrix(variant: str, bits: int, pattern: str) -> None:
    for i, group_size in enumerate(GROUPS):
        shape = SHAPES[(i + bits) % len(SHAPES)]
        base = uniform(shape, bits, group_size, torch.float32 if i % 3 == 0 else torch.float16)
        assert_law([base if pattern == "dense" else pruned(base, pattern)], (1, 3, 13), (shape, group_size))


@pytest.mark.parametrize("pattern", ["dense", "2:4"])
@pytest.mark.parametrize("bits", range(1, 5))
def test_tables_of_levels_multiply_as_their_matrix(variant: str, bits: int, pattern: str) -> None:
    for i, group_size in enumerate(GROUPS):
        shape = SHAPES[(i + bits) % len(SHAPES)]
        base = codebook(shape, bits, group_size)
        assert_law([base if pattern == "dense" else pruned(base, pattern)], (1, 3, 13), (shape, group_size))


@pytest.mark.parametrize("pattern", ["dense", "2:4", 0.4])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_with_zeros_multiply_as_their_matrix(variant: str, bits: int, pattern: str | float) -> None:
    for i, group_size in enumerate(GROUPS):
        shape = SHAPES[(i + bits) % len(SHAPES)]
        dtype = torch.float32 if i % 3 == 0 else torch.float16
        base = uniform(shape, bits, group_size, dtype, scaled=i % 4 == 0, zeros=True)
        assert_law([base if pattern == "dense" else pruned(base, pattern)], (1, 3, 13), (shape, group_size))


def test_zeros_in_the_middle_multiply_as_a_symmetric_grid_to_the_last_bit(variant: str) -> None:
    base = uniform((33, 172), 4, 32)
    middle = Uniform(base.codes, base.scale, 4, 32, None, torch.zeros_like(base.scale, dtype=torch.int8))
    x = torch.randn(13, 172)
    for precision in BOUND:
        for batch in (1, 3, 13):
            assert torch.equal(layer([middle])(x[:batch], precision)[0], layer([base])(x[:batch], precision)[0])


def test_zeros_of_inputs_that_are_all_alike_do_not_drown_the_product(variant: str) -> None:
    # Every weight of a row is 0 or its scale, far from the middle of the codes, and the inputs do not cancel.
    codes = torch.full((16, 128), 7, dtype=torch.int8)
    codes[:, ::2] = 6
    part = Uniform(codes, torch.full((16, 1), 0.01).half(), 4, 128, None, torch.full((16, 1), 6, dtype=torch.int8))
    x = 1 + 0.001 * torch.randn(9, 128)
    for batch in (1, 3, 9):
        [y] = layer([part])(x[:batch], "precise")
        torch.testing.assert_close(y, x[:batch] @ part.dense().T, rtol=1e-4, atol=0)


def test_a_factor_with_zeros_is_refused_in_words_and_by_the_library() -> None:
    shape = (33, 172)
    factor = uniform((6, 33), 4, 8, zeros=True)
    parts = Parts(uniform(shape, 4, 32), adapter=LowRank(factor, uniform((6, 172), 4, 32)))
    assert unfit(parts.describe()) == "a factor of its adapter has zeros beside its scales"
    with pytest.raises(CheckpointError, match="an argument that the kernels do not take"):
        packed_sum(list(parts))


@pytest.mark.parametrize("kind", ["uniform-4", "uniform-7", "table-3"])
@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_every_batch_size_gives_the_same_rows(kind: str, pattern: str) -> None:
    # 1, up to 4 and more columns are three pieces of code, and more than 128 are taken in turns.
    bits = int(kind[-1])
    base: Elementwise = uniform((770, 172), bits, 20) if kind.startswith("uniform") else codebook((770, 172), bits, 128)
    part = base if pattern == "dense" else pruned(base, pattern)
    assert_law([part], (0, 1, 2, 3, 4, 5, 8, 13, 128, 130, 300), bias=torch.randn(770))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 172), (770, 101), (1, 3)])
def test_plain_values_multiply_in_float32(variant: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_law([Plain(torch.randn(shape).to(dtype))], (1, 2, 3, 4, 5, 8, 13), bias=torch.randn(shape[0]))


@pytest.mark.parametrize("pattern", [0.5, 0.3, "1:4", "4:8", "3:4"])
@pytest.mark.parametrize("kind", ["uniform", "table"])
def test_other_masks_than_two_of_four_multiply_as_their_matrix(variant: str, pattern: str | float, kind: str) -> None:
    for group_size in ("per-channel", 20, 128):
        inner = uniform((33, 352), 4, group_size) if kind == "uniform" else codebook((33, 352), 4, group_size, zero=True)
        assert_law([pruned(inner, pattern)], (1, 3, 13), group_size)


@pytest.mark.parametrize("pattern", ["dense", "2:4", 0.5])
def test_factors_of_the_inputs_multiply_the_weights(variant: str, pattern: str | float) -> None:
    for group_size in ("per-channel", 20, 64):
        base = uniform((33, 172), 4, group_size, scaled=True)
        parts = [base if pattern == "dense" else pruned(base, pattern), low_rank((33, 172), 6, 8, 32)]
        assert_law(parts, (1, 3, 13), group_size)


@pytest.mark.parametrize("bits", range(2, 9))
def test_masks_that_keep_fewer_than_two_of_some_fours(variant: str, bits: int) -> None:
    # Each row: fours with none, one (at each place) and two kept, the same number in all, as the format asks.
    fours = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1]])
    keep = torch.stack([fours[torch.randperm(7)].flatten() for _ in range(3 * 16)]).view(16, 84).bool()
    for group_size in ("per-channel", 4, 20, 32):
        assert_law([Pruned(uniform((16, 84), bits, group_size), keep, "2:4")], (1, 3, 13), group_size)
    if bits <= 4:
        assert_law([Pruned(codebook((16, 84), bits, 20, zero=True), keep, "2:4")], (1, 3, 13))


def low_rank(shape: tuple[int, int], rank: int, bits: int, group_size: grid.GroupSize) -> LowRank:
    def factor(width: int) -> Elementwise:
        if bits == 16:
            return Plain((0.1 * torch.randn(rank, width)).half())
        return uniform((rank, width), bits, group_size, torch.float32 if group_size == "per-tensor" else torch.float16)

    return LowRank(factor(shape[0]), factor(shape[1]))


@pytest.mark.parametrize("shape", [(50, 172), (96, 352)])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_low_rank_parts_are_added(variant: str, bits: int, shape: tuple[int, int]) -> None:  # law 25
    # Along the outputs, groups of 4, 20 and 40 do not line up with the kernels' sixteen rows.
    for group_size in ("per-tensor",) if bits == 16 else ("per-tensor", "per-channel", 4, 20, 32, 40, 128):
        for rank in (1, 6, 32, 130):
            base = pruned(uniform(shape, 4, 32), "2:4")
            assert_law([base, low_rank(shape, rank, bits, group_size)], (1, 3, 13), (group_size, rank), torch.randn(shape[0]))


def test_a_low_rank_part_of_many_outputs_is_added() -> None:
    assert_law([uniform((770, 172), 4, 64), low_rank((770, 172), 6, 4, 20)], (1, 5))


def test_low_rank_factors_may_be_tables_and_of_different_kinds(variant: str) -> None:
    parts: list[Part] = [Plain(torch.randn(50, 172).bfloat16())]
    for left, right in (
        (codebook((6, 50), 4, 20), codebook((6, 172), 3, 32)),
        (Plain(torch.randn(5, 50)), uniform((5, 172), 5, "per-channel")),
        (uniform((17, 50), 3, 32), Plain(0.1 * torch.randn(17, 172).bfloat16())),
    ):
        assert_law([parts[0], LowRank(left, right)], (1, 4, 9))


def test_eight_low_rank_parts_are_added_and_a_ninth_is_refused() -> None:
    parts = [uniform((50, 172), 4, 32), *(low_rank((50, 172), rank, 8, 32) for rank in range(1, 9))]
    assert_law(parts, (1, 3, 13))
    with pytest.raises(CheckpointError):
        layer([*parts, low_rank((50, 172), 9, 8, 32)])


def test_layers_of_one_input_multiply_together_as_alone(variant: str) -> None:  # law 25
    layers: list[list[Part]] = [
        [pruned(uniform((33, 172), 4, 128), "2:4"), low_rank((33, 172), 6, 8, 32)],
        [codebook((50, 172), 4, 20)],
        [uniform((16, 172), 8, "per-channel", scaled=True)],
        [uniform((40, 172), 4, 64, zeros=True)],
        [uniform((7, 172), 3, 32), low_rank((7, 172), 3, 16, "per-channel")],
        [Plain(torch.randn(5, 172).half())],
    ]
    biases = [torch.randn(33), None, torch.randn(16), torch.randn(40), None, torch.randn(5)]
    together = several(layers, biases)
    for batch in (1, 3, 13, 130):
        x = torch.randn(batch, 172)
        for precision in BOUND:
            alone = [layer(parts, bias)(x, precision)[0] for parts, bias in zip(layers, biases, strict=True)]
            for one, other in zip(alone, together(x, precision), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("zeros", [False, True])
def test_what_is_unpacked_is_what_multiplies(precision: Precision, zeros: bool) -> None:
    parts: list[Part] = [
        pruned(uniform((50, 172), 5, 20, scaled=True, zeros=zeros), "2:4"),
        low_rank((50, 172), 6, 4, 20),
        LowRank(codebook((3, 50), 4, 32), codebook((3, 172), 2, "per-channel")),
        LowRank(Plain(torch.randn(2, 50)), Plain(torch.randn(2, 172).half())),
    ]
    blob = packed_sum(parts)
    matrices = [parts[0].dense()]
    for part in parts[1:]:
        assert isinstance(part, LowRank)
        matrices += [part.right.dense(), part.left.dense().T]
    for i, matrix in enumerate(matrices):
        found = bindings.unpack(blob, i, (matrix.shape[0], matrix.shape[1]), precision)
        # Even grids and plain values are exact but for rounding; of a table, levels are rounded to 7 or 12 bits.
        table = i in (3, 4)
        bound = (1e-3 if precision == "precise" else 3e-2) if table else 1e-6
        assert (found - matrix).norm() <= bound * matrix.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_of_activations(variant: str, dtype: torch.dtype) -> None:
    part = pruned(uniform((33, 172), 4, 32), "2:4")
    x = torch.randn(2, 3, 172).to(dtype)
    [y] = layer([part])(x, "precise")
    assert y.dtype == dtype and y.shape == (2, 3, 33)
    expected = x.double() @ part.dense().double().T
    unit = 1e-3 if dtype == torch.float64 else torch.finfo(dtype).eps
    assert (y.double() - expected).norm() <= unit * expected.norm()


def test_activations_need_not_be_contiguous_or_aligned() -> None:
    part = uniform((33, 172), 4, 32)
    packed, x = layer([part]), torch.randn(5, 172)
    [expected] = packed(x, "precise")
    [strided] = packed(x.T.contiguous().T, "precise")
    shifted = torch.empty(5 * 172 + 1)[1:].view(5, 172).copy_(x)
    [moved] = packed(shifted, "precise")
    assert torch.equal(strided, expected) and torch.equal(moved, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", ["per-tensor", "per-channel", 32, 20])
def test_scales_of_any_size_multiply(variant: str, dtype: torch.dtype, group_size: grid.GroupSize) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    largest = 60000.0 if dtype == torch.float16 else 1e27
    for size in (0.0, smallest / 8, smallest, largest):
        base = uniform((33, 172), 4, group_size)
        scale = torch.full_like(base.scale, size, dtype=dtype)
        if scale.numel() > 1:
            scale[::2] *= 0.5
        part = Uniform(base.codes, scale, 4, group_size)
        packed = layer([part])
        for batch in (1, 3, 13):
            # A product with tiny weights must not be tiny itself, or its own float32 would be in question.
            x = torch.randn(batch, 172) * (1e10 if size < 1e-30 else 1)
            [y] = packed(x, "precise")
            expected = x.double() @ part.dense().double().T
            assert (y.double() - expected).norm() <= BOUND["precise"] * expected.norm(), (size, batch)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-33, 1e-10, 1e30])
def test_inputs_of_any_size_multiply(variant: str, size: float) -> None:
    part = Uniform(uniform((33, 172), 4, 32).codes, torch.ones(33, 6), 4, 32)
    packed = layer([part])
    for batch in (1, 3, 13):
        x = torch.randn(batch, 172) * size
        [y] = packed(x, "precise")
        expected = x.double() @ part.dense().double().T
        # Groups of 128 inputs whose largest is below 1e-34 count as zeros.
        assert ((y.double() - expected).abs() <= 1e-3 * expected.norm() + 1e-30).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stays_in_its_token(variant: str, bad: float) -> None:
    for parts in (
        [pruned(uniform((33, 172), 4, 20), "2:4"), low_rank((33, 172), 6, 4, 20)],
        [codebook((33, 172), 4, "per-channel"), low_rank((33, 172), 6, 16, "per-channel")],
        [Plain(torch.randn(33, 172).half())],
    ):
        packed = layer(parts)
        for batch in (1, 4, 13):
            x = torch.randn(batch, 172)
            clean = [packed(x, precision)[0] for precision in BOUND]
            x[batch // 2, 150] = bad
            others = torch.arange(batch) != batch // 2
            for precision, before in zip(BOUND, clean, strict=True):
                [y] = packed(x, precision)
                assert torch.equal(y[others], before[others])
                assert not y[batch // 2].isfinite().any()


def test_the_number_of_threads_changes_nothing(variant: str) -> None:
    parts = [pruned(uniform((770, 352), 4, 128), "2:4"), low_rank((770, 352), 40, 4, 20)]
    packed = layer(parts, torch.randn(770))
    before = torch.get_num_threads()
    try:
        for batch in (1, 3, 13) if variant == KERNEL_VARIANTS[0] else (3,):
            x = torch.randn(batch, 352)
            found = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                found.append(packed(x, "fast")[0])
            assert all(torch.equal(found[0], other) for other in found[1:])
    finally:
        torch.set_num_threads(before)


def test_the_tokens_around_one_change_its_rounding_at_most(variant: str) -> None:
    # One, up to four and more tokens add the same integers up, but join the groups' sums as floats in another order.
    parts = [pruned(uniform((50, 352), 4, 128), "2:4"), low_rank((50, 352), 6, 8, 32)]
    packed, x = layer(parts), torch.randn(130, 352)
    for precision in BOUND:
        [all_of_them] = packed(x, precision)
        for start, batch in ((0, 1), (3, 2), (7, 4), (100, 5), (17, 9)):
            [some] = packed(x[start : start + batch], precision)
            there = all_of_them[start : start + batch]
            if batch > 4:
                assert torch.equal(some, there)
            # A hidden value may cross to the next 8-bit integer, where the left factor's input is rounded again.
            assert (some - there).norm() <= (1e-5 if precision == "precise" else 1e-2) * there.norm()


def test_all_variants_agree() -> None:
    # The integers are the same; sums of floats are rounded in another order, and a fused multiply-add rounds an activation
    # on the middle between two integers the other way now and then.
    parts = [codebook((50, 352), 4, 128), low_rank((50, 352), 6, 8, 32)]
    packed, x = layer(parts), torch.randn(13, 352)
    try:
        for precision in BOUND:
            found = {}
            for name in KERNEL_VARIANTS:
                bindings.use_variant(name)
                found[name] = packed(x, precision)[0]
            for one in found.values():
                assert (one - found["portable"]).norm() <= (1e-5 if precision == "precise" else 3e-3) * one.norm()
    finally:
        bindings.use_variant(KERNEL_VARIANTS[0])


# What is refused


def test_a_table_without_zero_under_a_mask_that_needs_one_is_refused() -> None:
    inner = codebook((16, 64), 3, "per-channel")
    assert 0 not in inner.values
    with pytest.raises(CheckpointError, match="without zero"):
        layer([pruned(inner, 0.5)])
    module = CompressedLinear.from_parts(Parts(pruned(inner, 0.5)), None)
    assert module.use_kernels("auto").refused is not None
    module(torch.randn(2, 64))


def test_more_than_two_of_four_under_the_name_of_two_of_four_are_refused() -> None:
    keep = choose(torch.rand(16, 64), Pattern.parse("3:4"))
    with pytest.raises(CheckpointError, match="more than two of four"):
        layer([Pruned(uniform((16, 64), 4, "per-channel"), keep, "2:4")])


def test_rows_that_keep_different_numbers_are_refused() -> None:
    keep = choose(torch.rand(16, 64), Pattern.parse("2:4"))
    stored = CompressedLinear.from_parts(Parts(Pruned(uniform((16, 64), 4, "per-channel"), keep, "2:4")), None).stored()
    stored.tensors["weight_mask"] = stored.tensors["weight_mask"].clone()
    stored.tensors["weight_mask"][3, :4] = 0
    with pytest.raises(CheckpointError):
        pack(stored)


@pytest.mark.parametrize(
    "name", ["weight", "weight_mask", "weight_scale", "weight_channel_scale", "adapter_left", "adapter_right_scale"]
)
@pytest.mark.parametrize("change", ["short", "long"])
def test_stored_tensors_of_other_sizes_are_refused(name: str, change: str) -> None:
    parts = (pruned(uniform((16, 64), 4, 32, scaled=True), "2:4"), low_rank((16, 64), 4, 4, 8))
    stored = CompressedLinear.from_parts(Parts(*parts), None).stored()
    right = stored.tensors[name]
    stored.tensors[name] = right[..., :-1] if change == "short" else torch.cat([right, right[..., :1]], dim=-1)
    with pytest.raises(CheckpointError):
        pack(stored)


def test_a_table_of_another_length_is_refused() -> None:
    stored = CompressedLinear.from_parts(Parts(codebook((16, 64), 4, 32)), None).stored()
    stored.tensors["weight_codebook"] = stored.tensors["weight_codebook"][:-1]
    with pytest.raises(CheckpointError):
        pack(stored)


def test_activations_of_another_width_are_refused() -> None:
    packed = layer([uniform((16, 64), 4, 32)])
    for width in (0, 32, 65):
        with pytest.raises(KernelError, match="64"):
            packed(torch.randn(2, width), "fast")


# Bytes that are not, or no longer, a packed layer

HEADER, MATRIX_HEADER = 48, 192
"""sizes of BlobHeader and MatrixHeader of csrc/layout.h; the offsets of the matrices follow the first"""


def small_blob() -> Tensor:
    parts = (pruned(uniform((20, 84), 4, 20, scaled=True), "2:4"), low_rank((20, 84), 3, 4, 6))
    return pack(CompressedLinear.from_parts(Parts(*parts), None).stored())


def aligned(content: Tensor) -> Tensor:
    """A copy that begins at a multiple of 64 bytes and ends where its memory ends."""
    copied = content.clone()
    assert copied.data_ptr() % 64 == 0
    return copied


def test_a_blob_that_is_cut_short_or_longer_is_refused() -> None:
    blob = small_blob()
    assert bindings.is_valid(blob)
    for size in (0, 1, 47, 48, 64, 100, 128, 500, 1000, blob.numel() - 64, blob.numel() - 1):
        assert not bindings.is_valid(aligned(blob[:size])), size
    assert not bindings.is_valid(aligned(torch.cat([blob, blob[:64]])))


def test_a_short_blob_that_claims_to_be_whole_is_refused() -> None:
    blob = small_blob()
    for size in (48, 64, 128, 192, 512, 1024):
        cut = aligned(blob[:size])
        cut[8:16] = torch.tensor([size], dtype=torch.int64).view(torch.uint8)
        for matrices in (1, 3, 17):
            cut[32:36] = torch.tensor([matrices], dtype=torch.int32).view(torch.uint8)
            assert not bindings.is_valid(cut), (size, matrices)


def test_a_byte_changed_in_the_headers_and_tables_is_noticed() -> None:
    blob = small_blob()
    places = list(range(HEADER + 3 * 8))
    for start in blob[HEADER : HEADER + 3 * 8].view(torch.int64).tolist():
        header = blob[start : start + MATRIX_HEADER].view(torch.int64)
        places += range(start, start + int(header[-2]))  # up to where its weights begin
    for at in places:
        for flipped in (1, 0x80):
            blob[at] ^= flipped
            assert not bindings.is_valid(blob), at
            blob[at] ^= flipped
    assert bindings.is_valid(blob)


def test_offsets_that_lead_anywhere_are_not_followed() -> None:
    blob = small_blob()
    for place in (HEADER, HEADER + 8, HEADER + 16):
        for value in (0, -64, 2**63 - 64, -(2**63), 2**62, blob.numel(), blob.numel() - 64, 64):
            damaged = aligned(blob)
            damaged[place : place + 8] = torch.tensor([value], dtype=torch.int64).view(torch.uint8)
            assert not bindings.is_valid(damaged), (place, value)


def test_a_blob_on_any_address_multiplies_in_python_and_is_refused_in_c() -> None:
    blob = small_blob()
    moved = torch.empty(blob.numel() + 64, dtype=torch.uint8)[32 : 32 + blob.numel()].copy_(blob)
    assert not bindings.is_valid(moved)
    x = torch.randn(3, 84)
    for precision in BOUND:
        [expected] = PackedProducts([blob], [None], [20], 84)(x, precision)
        [found] = PackedProducts([moved], [None], [20], 84)(x, precision)
        assert torch.equal(expected, found)


# Processes and threads


def test_threads_may_multiply_at_the_same_time() -> None:
    parts = [pruned(uniform((770, 352), 4, 128), "2:4"), low_rank((770, 352), 40, 4, 20)]
    packed, x = layer(parts), torch.randn(13, 352)
    before = torch.get_num_threads()
    [expected] = packed(x, "fast")
    wrong: list[int] = []

    def multiply(number: int) -> None:
        torch.set_num_threads(2)
        for batch in (13, 7, 13, 5, 13) * 4:
            if not torch.equal(packed(x[:batch], "fast")[0], expected[:batch]):
                wrong.append(number)

    try:
        threads = [threading.Thread(target=multiply, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_multiplies_with_threads_of_its_own() -> None:
    parts = [pruned(uniform((770, 352), 4, 128), "2:4")]
    packed, x = layer(parts), torch.randn(3, 352)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        [expected] = packed(x, "fast")
        child = os.fork()
        if child == 0:
            same = False
            try:
                same = all(torch.equal(packed(x, "fast")[0], expected) for _ in range(20))
            finally:
                os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(packed(x, "fast")[0], expected)
    finally:
        torch.set_num_threads(before)


# The interface

C_COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


MIRRORS: list[tuple[str, type[ctypes.Structure]]] = [
    ("SlimlmMatrix", bindings.Matrix),
    ("SlimlmProduct", bindings.Product),
    ("SlimlmBlock", native_decoder.BlockStruct),
    ("SlimlmDecoder", native_decoder.DecoderStruct),
]


@pytest.mark.skipif(C_COMPILER is None or not SOURCES.is_dir(), reason="there is no C compiler, or no source")
@pytest.mark.parametrize(("name", "mirror"), MIRRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_structures_lie_in_memory_as_in_c(name: str, mirror: type[ctypes.Structure], tmp_path: Path) -> None:
    assert C_COMPILER is not None
    fields = [field[0] for field in mirror._fields_]
    offsets = ", ".join(f"(int)offsetof({name}, {field})" for field in fields)
    text = f'#include <stddef.h>\n#include <stdio.h>\n#include "kernels.h"\nint main(void) {{\n  int at[] = {{{offsets}}};\n'
    text += f'  for (int i = 0; i < {len(fields)}; ++i) printf("%d ", at[i]);\n  printf("%d", (int)sizeof({name}));\n}}\n'
    source, program = tmp_path / "sizes.c", tmp_path / "sizes"
    source.write_text(text)
    subprocess.run([C_COMPILER, "-std=c11", f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    assert said == [str(getattr(mirror, field).offset) for field in fields] + [str(ctypes.sizeof(mirror))]


def test_arguments_that_make_no_sense_are_refused_in_c() -> None:
    library, blob, x, y = bindings.functions(), small_blob(), torch.randn(2, 84), torch.empty(2, 20)
    good = bindings.Product(blob.data_ptr(), blob.numel(), None, y.data_ptr())
    kinds = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_int64)
    kinds += (ctypes.c_int32, ctypes.c_int32)

    def products(*values: Any) -> int:
        # The function takes C values as they come; Python's numbers would be cut to 32 bits.
        return library.slimlm_products(*(kind(value) for kind, value in zip(kinds, values, strict=True)))

    def address(product: ctypes.Structure) -> int:
        return ctypes.addressof(product)

    right = (address(good), 1, x.data_ptr(), 0, 2, 84, 1, 1)
    assert products(*right) == 0
    nowhere = bindings.Product(blob.data_ptr(), blob.numel(), None, None)
    other = bindings.Product(blob.data_ptr(), blob.numel() - 64, None, y.data_ptr())
    wrong: dict[int, tuple[Any, ...]] = {0: (None, address(nowhere), address(other)), 1: (0, -1), 2: (None,), 3: (-1, 1, 3)}
    wrong |= {4: (-1,), 5: (-84, 0, 83, 85), 6: (-1, 2)}
    for place, values in wrong.items():
        for value in values:
            assert products(*right[:place], value, *right[place + 1 :]) != 0, (place, value)
    assert products(*right[:7], -5) == 0, "any number of threads below one is one"
    assert library.slimlm_packed_bytes(None, 1) < 0
    for count in (0, 2, 19):
        assert library.slimlm_packed_bytes(ctypes.byref(bindings.Matrix()), count) < 0
    assert library.slimlm_unpack(blob.data_ptr(), blob.numel(), 3, 0, y.data_ptr()) != 0
    assert library.slimlm_use(b"no such variant") != 0
