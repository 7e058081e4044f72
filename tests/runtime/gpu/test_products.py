"""Layers on the GPU kernels: the matrix that their parts stand for, for all parts, odd shapes and any batch.

On a GPU where there is one; else in Triton's interpreter, which takes seconds for a product, so shapes are small.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import KernelError
from slimlm.core.parts.base import Part
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.runtime.backends.triton import Gpu
from slimlm.runtime.gpu import layout, products, tiles
from tests.runtime.gpu.layers import (
    ERRORS,
    NARROW,
    OUT,
    REASON,
    WHERE,
    WIDTH,
    codes,
    combinations,
    draw,
    error,
    exact,
    layer,
    table,
)

pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no GPU kernels: {REASON}")


def without_channel_scale(part: Part) -> Part:
    """As the layout has it."""
    if isinstance(part, Pruned) and isinstance(part.inner, Uniform):
        return replace(part, inner=replace(part.inner, channel_scale=None))
    return replace(part, channel_scale=None) if isinstance(part, Uniform) else part


def multiplied(parts: tuple[Part, ...], x: Tensor, *, bias: bool = True) -> Tensor:
    gpu, one = Gpu(), layer(parts, bias=bias)
    assert gpu.refuses(one.stored()) is None
    return gpu.matmul(x.to(WHERE), gpu.prepare(one.stored()))


@pytest.mark.parametrize("name", combinations())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_output_is_that_of_the_dense_matrix(name: str, dtype: torch.dtype) -> None:
    parts = combinations()[name]
    x = draw(3, WIDTH, seed=4).to(dtype)
    y = multiplied(parts, x)
    assert y.dtype == dtype and y.shape == (3, OUT)
    assert error(y, exact(parts, x)) < ERRORS[dtype]


@pytest.mark.parametrize(("batch", "out", "width"), [(1, 64, 256), (9, 130, 512), (20, 3, 260), (40, 66, 8), (130, 64, 256)])
@pytest.mark.parametrize(
    "name",
    ["2:4 groups of 32 + adapter", "groups of 128 + adapter of rows", "zeros, groups of 32, 3 bits, inputs scaled"],
)
def test_every_batch_and_shape_has_its_tile(name: str, batch: int, out: int, width: int) -> None:
    parts = combinations(out, width)[name]
    x = draw(batch, width, seed=4).half()
    assert error(multiplied(parts, x, bias=False), exact(parts, x, bias=False)) < ERRORS[torch.float16]


@pytest.mark.parametrize("left", [codes((5, OUT), 32, seed=5), Plain(draw(5, OUT, seed=5).half() / 8)], ids=["codes", "plain"])
def test_ranks_that_fill_up_give_nothing_even_under_a_table_of_one_scale(left: Part) -> None:
    # A rank of the table's first level alone would come to more than float16 holds, and infinity times zero is NaN.
    right, size = table((5, WIDTH), "per-tensor", seed=6), 1000.0
    assert abs(float(right.values[0] * right.scale)) * WIDTH * size > 65504
    parts = (codes((OUT, WIDTH), 128), LowRank(left, right))
    x = torch.full((2, WIDTH), size).half()
    assert error(multiplied(parts, x), exact(parts, x)) < ERRORS[torch.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_more_tokens_than_are_fused_multiply_an_unpacked_weight(dtype: torch.dtype) -> None:
    parts = combinations()["2:4 table, groups of 32 + adapter"]
    x = draw(tiles.FUSED_UP_TO + 1, WIDTH, seed=4).to(dtype)
    assert error(multiplied(parts, x), exact(parts, x)) < ERRORS[dtype]


@pytest.mark.parametrize("name", combinations())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_an_unpacked_weight_is_that_of_the_reference_to_the_bit(name: str, dtype: torch.dtype) -> None:
    base, *extras = combinations()[name]
    ready = Gpu().prepare(layer((base, *extras)).stored()).layer
    found = products.matrix(ready.base, dtype)
    assert torch.equal(found.cpu(), without_channel_scale(base).dense().to(dtype))
    assert found.stride(0) % 64 == 0, "so that a thread stores 16 bytes at a time"
    for extra in extras:
        assert isinstance(extra, LowRank)
        if isinstance(ready.right, layout.Packed):
            right = products.matrix(ready.right, dtype).cpu()
            assert torch.equal(right[: extra.rank], extra.right.dense().to(dtype)) and not right[extra.rank :].any()
        if ready.tail is not None and (tail := ready.tail.packed) is not None:
            about = tail.words, tail.scale, tail.codebook, OUT, tail.width, ready.tail.group, dtype, None
            left = torch.ops.slimlm.gpu_unpacked(*about).cpu()
            assert torch.equal(left[:, : extra.rank], extra.left.dense().T.to(dtype)) and not left[:, extra.rank :].any()


@pytest.mark.parametrize("leading", [(1,), (2, 3), (), (0,), (2, 0)], ids=str)
def test_leading_dimensions_stay(leading: tuple[int, ...]) -> None:
    parts = combinations()["2:4 one scale + plain adapter"]
    x = draw(*leading, WIDTH, seed=4).half()
    y = multiplied(parts, x)
    assert y.shape == (*leading, OUT)
    assert not y.numel() or error(y, exact(parts, x)) < ERRORS[torch.float16]


def test_the_memory_layout_of_the_input_does_not_matter() -> None:
    gpu, one = Gpu(), layer(combinations()["2:4 groups of 32 + adapter"])
    ready = gpu.prepare(one.stored())
    for x in (draw(WIDTH, 3).T, draw(3, 2 * WIDTH)[:, ::2], draw(3, 2 * WIDTH)[:, :WIDTH], draw(1, WIDTH).expand(3, WIDTH)):
        narrow = x.to(WHERE, torch.float16)
        assert torch.equal(gpu.matmul(narrow, ready), gpu.matmul(narrow.clone(memory_format=torch.contiguous_format), ready))


@pytest.mark.parametrize("name", ["2:4 table, groups of 32 + adapter", "one group longer than a row"])
def test_what_lies_beyond_the_inputs_in_memory_counts_for_nothing(name: str) -> None:
    gpu, x = Gpu(), draw(2, WIDTH, seed=4).half()
    ready = gpu.prepare(layer(combinations()[name]).stored())
    wide = torch.full((2, 512), float("nan"), dtype=torch.float16)
    wide[:, :WIDTH] = x
    assert torch.equal(gpu.matmul(wide.to(WHERE)[:, :WIDTH], ready), gpu.matmul(x.to(WHERE), ready))


def test_a_split_product_is_the_same_every_time_and_leaves_its_counters_at_zero() -> None:
    gpu, one = Gpu(), layer(combinations()["groups of 128 + adapter of rows"])
    ready, x = gpu.prepare(one.stored()), draw(2, WIDTH).to(WHERE, torch.float16)
    tile = tiles.tile_for(2, 128, (8, 0))
    assert tiles.splits_for(tile, 2, 3, 2)[0] > 1  # what the interpreter's made-up card would do
    first = gpu.matmul(x, ready)
    assert all(torch.equal(gpu.matmul(x, ready), first) for _ in range(3))
    assert not ready.layer.counters.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
def test_inputs_that_are_not_finite_stay_in_their_row() -> None:
    parts = combinations()["2:4 one scale"]
    x = draw(3, WIDTH).half()
    x[1, 5] = float("inf")
    y = multiplied(parts, x).cpu()
    assert bool(y[[0, 2]].isfinite().all()) and not bool(y[1].isfinite().all())


def test_activations_of_another_width_are_refused_in_words() -> None:
    with pytest.raises(KernelError, match=rf"the layer has {WIDTH} inputs, and the activations are \[2, {WIDTH - 4}\]"):
        multiplied(combinations()["2:4 one scale"], draw(2, WIDTH - 4).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_are_those_of_the_dense_matrix(dtype: torch.dtype) -> None:
    parts = combinations()["2:4 groups of 32 + adapter"]
    gpu, one = Gpu(), layer(parts)
    assert one.bias is not None
    one.bias.requires_grad_()
    x, weights = draw(3, WIDTH).to(WHERE, dtype).requires_grad_(), draw(3, OUT, seed=9)
    gpu.matmul(x, gpu.prepare(one.stored())).mul(weights.to(WHERE, dtype)).sum().backward()
    assert x.grad is not None and one.bias.grad is not None
    assert error(x.grad, weights.double() @ Parts(*parts).dense().double()) < ERRORS[dtype]
    assert error(one.bias.grad, weights.sum(dim=0).double()) < ERRORS[dtype]


def test_a_layer_that_was_prepared_in_inference_mode_gives_gradients_later() -> None:
    gpu, one = Gpu(), layer(combinations()["2:4 one scale"])
    with torch.inference_mode():
        ready = gpu.prepare(one.stored())
    x = draw(1, WIDTH).to(WHERE, torch.float16).requires_grad_()
    gpu.matmul(x, ready).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


@pytest.mark.parametrize("name", ["2:4 groups of 32 + adapter", "zeros, groups of 128 + adapter"])
def test_the_operations_that_torch_compile_sees_are_well_behaved(name: str) -> None:
    one = layer(combinations()[name])
    ready = Gpu().prepare(one.stored()).layer
    base, tail = ready.base, ready.tail
    assert tail is not None and tail.packed is not None
    x = draw(2, 1, WIDTH).to(WHERE, torch.float16).requires_grad_()
    t = draw(2, 1, tail.packed.width).to(WHERE, torch.float16).requires_grad_()
    packed = tail.packed.words, tail.packed.scale, None
    arguments = (x, base.words, base.scale, None, one.bias, t, *packed, ready.counters, OUT, WIDTH, tail.group, base.zero)
    torch.library.opcheck(torch.ops.slimlm.gpu_product.default, arguments)
    unpacked = (base.words, base.scale, None, OUT, WIDTH, 0, torch.float32, base.zero)
    torch.library.opcheck(torch.ops.slimlm.gpu_unpacked.default, unpacked)


def test_a_first_factor_of_floats_is_converted_once_and_what_is_stored_is_not_lost() -> None:
    parts = combinations()["2:4 one scale + plain adapter"]
    gpu, one, x = Gpu(), layer(parts), draw(1, WIDTH)
    extra = parts[1]
    assert isinstance(extra, LowRank) and isinstance(extra.right, Plain)
    ready = gpu.prepare(one.stored())
    right = ready.layer.right
    assert isinstance(right, layout.Values) and right.casts.stored.dtype == torch.bfloat16
    before = right.bytes()
    with torch.inference_mode():
        gpu.matmul(x.to(WHERE, torch.float16), ready)
    converted = right.of(torch.float16)
    assert right.of(torch.float16).data_ptr() == converted.data_ptr() and right.bytes() == before
    assert not converted.is_inference() and right.casts.stored.device.type == "cpu"
    assert torch.equal(right.of(torch.float32)[:5].cpu(), extra.right.values.float()), "of more bits: as it is stored"
    assert torch.equal(right.of(torch.bfloat16)[:5].cpu(), extra.right.values)
    assert right.of(torch.float16).data_ptr() == converted.data_ptr(), "a captured graph may read it"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_layer_compiles_without_a_break(backend: str) -> None:
    one = layer(combinations()["2:4 one scale + plain adapter"])
    one.use_kernels("gpu")
    one.prepare()
    x = draw(3, WIDTH).to(WHERE, torch.float16)
    compiled = torch.compile(one, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), one(x))
