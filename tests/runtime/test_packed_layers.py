"""Layers on the CPU kernels: the matrix that their parts stand for, whoever calls, however often, from wherever."""

import copy
import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slimlm.core.errors import KernelError
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.core.profiling import Call, profiling
from slimlm.inference.decode.grouped import grouped_call
from slimlm.runtime.dense import DenseLinear, WideEmbedding, widen_activations
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import describe, describe_backends, precise_kernels, prefer_fast, use_kernels
from tests.conftest import needs_kernels

pytestmark = needs_kernels

OUT, WIDTH = 40, 96
# Relative to the largest output: rounding 96 activations to 255 or 65023 levels, each by at most half a step of the largest,
# and tables to 7 or 12 bits.
ERRORS: dict[Kernels, float] = {"fast": 3e-2, "precise": 1e-3}
both = pytest.mark.parametrize("kernels", ["fast", "precise"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(shape: tuple[int, int], seed: int = 0) -> Uniform:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-7, 8, shape, generator=generator, dtype=torch.int8)
    return Uniform(drawn, (0.02 + 0.02 * torch.rand(shape[0], 1, generator=generator)).half(), 4, "per-channel")


def parts(out: int = OUT, seed: int = 0) -> tuple[Part, ...]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(16, (out, WIDTH), generator=generator, dtype=torch.uint8)
    levels = torch.linspace(-1.5, 1.5, 15).pow(3)
    table = torch.cat((levels, torch.tensor([4.0]))).half()
    base = Codebook(index, table, (0.1 + 0.1 * torch.rand(out, 3, generator=generator)).half(), 4, 32)
    keep = choose(draw(out, WIDTH, seed=seed + 1), Pattern.parse("2:4"))
    return Pruned(base, keep, "2:4"), LowRank(codes((8, out), seed), codes((8, WIDTH), seed + 1))


def layer(kernels: Kernels, *, bias: bool = True, out: int = OUT, seed: int = 0) -> CompressedLinear:
    made = CompressedLinear.from_parts(Parts(*parts(out, seed)), draw(out, seed=8) if bias else None)
    made.use_kernels(kernels)
    return made


def near(found: Tensor, exact: Tensor, allowed: float) -> bool:
    return bool((found.double() - exact.double()).abs().max() <= allowed * exact.double().abs().max())


def exact(x: Tensor) -> Tensor:
    return x.double() @ Parts(*parts()).dense().double().T + draw(OUT, seed=8).double()


@both
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 3), (2, 1, 5), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_output_is_that_of_the_dense_matrix(kernels: Kernels, leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*leading, WIDTH, seed=4).to(dtype)
    y = layer(kernels)(x)
    assert y.shape == (*leading, OUT) and y.dtype == dtype
    # In 16 bits the output is rounded once more, by half of its epsilon.
    assert near(y, exact(x), ERRORS[kernels] + torch.finfo(dtype).eps)


@both
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_no_rows_give_no_rows(kernels: Kernels, leading: tuple[int, ...]) -> None:
    assert layer(kernels)(draw(*leading, WIDTH)).shape == (*leading, OUT)


@both
def test_the_memory_layout_of_the_input_does_not_matter(kernels: Kernels) -> None:
    one = layer(kernels)
    for x in (draw(WIDTH, 6, seed=4).T, draw(6, 2 * WIDTH, seed=5)[:, ::2], draw(1, WIDTH).expand(6, WIDTH)):
        assert torch.equal(one(x), one(x.clone(memory_format=torch.contiguous_format)))


def test_activations_of_another_width_are_refused_in_words() -> None:
    with pytest.raises(KernelError, match=rf"the layer has {WIDTH} inputs, and the activations are \[2, {WIDTH - 1}\]"):
        layer("fast")(draw(2, WIDTH - 1))


@both
def test_gradients_are_those_of_the_reference(kernels: Kernels) -> None:
    found = []
    for wanted in (kernels, "reference"):
        one = layer(wanted)
        assert one.bias is not None
        one.bias.requires_grad_()
        x = draw(3, WIDTH).requires_grad_()
        one(x).mul(draw(3, OUT, seed=9)).sum().backward()
        found.append((x.grad, one.bias.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # float32 sums of 40 terms


def test_layers_that_share_an_input_are_one_call_with_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer("fast", out=out, seed=out, bias=out > 20) for out in (48, 16, 24)]
    x = draw(2, WIDTH)
    expected = [one(x) for one in layers]
    together = grouped_call(layers)
    for one in layers:
        monkeypatch.setattr(one, "forward", None)
    for ours, theirs in zip(together(x), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_layers_of_two_precisions_or_kinds_are_called_in_turn() -> None:
    x = draw(2, WIDTH)
    dense = nn.Linear(WIDTH, 4)
    for layers in ([layer("fast"), layer("precise")], [layer("fast"), layer("reference")], [layer("fast"), dense]):
        with torch.no_grad():
            assert all(torch.equal(ours, one(x)) for ours, one in zip(grouped_call(layers)(x), layers, strict=True))


def together(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_multiply_by_one_layer_at_once_do_not_mix_their_results() -> None:
    one = layer("fast")
    inputs = [draw(i + 1, WIDTH, seed=i) for i in range(4)]
    expected = [one(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(one(inputs[i]), expected[i]):
                wrong.append(i)

    together(4, work)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_process_multiplies_too() -> None:
    one, x = layer("fast"), draw(5, WIDTH)
    expected = one(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(one(x), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@both
def test_the_operation_that_torch_compile_sees_is_well_behaved(kernels: str) -> None:
    one = layer("fast")
    ready = one.prepare()
    for x in (draw(3, WIDTH), draw(2, 1, WIDTH).bfloat16()):
        torch.library.opcheck(torch.ops.slimlm.packed_linear.default, (x, ready.blob, ready.bias, OUT, kernels))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, while it compiles
@both
def test_a_compiled_module_gives_what_it_gives_uncompiled(kernels: Kernels) -> None:
    module = nn.Sequential(nn.LayerNorm(WIDTH), layer(kernels), nn.SiLU())
    module.requires_grad_(False)
    module[1].prepare()
    x = draw(3, WIDTH)
    # The norm may add up in another order, and an activation be rounded to its neighbour.
    assert near(torch.compile(module, fullgraph=True)(x), module(x), 1e-2)


def test_a_copy_multiplies_for_itself() -> None:
    one, x = layer("precise"), draw(2, WIDTH)
    expected = one(x)
    twin = copy.deepcopy(one)
    assert torch.equal(twin(x), expected)
    assert twin.prepare().blob.data_ptr() != one.prepare().blob.data_ptr()


def test_a_bias_that_was_cast_is_the_one_that_is_added_and_the_bytes_stay() -> None:
    one, x = layer("precise"), torch.zeros(1, WIDTH)
    blob = one.prepare().blob
    one.bfloat16()
    assert one.prepare().blob is blob
    assert torch.equal(one(x)[0], draw(OUT, seed=8).bfloat16().float())
    one.load_state_dict(layer("precise", seed=5).state_dict())
    assert one.prepare().blob is not blob


@pytest.mark.parametrize("kernels", ["fast", "precise", "reference"])
def test_a_bias_that_is_replaced_at_every_call_does_not_pack_the_layer_again(kernels: Kernels) -> None:
    """As accelerate replaces the tensors of a layer that it keeps elsewhere between calls."""
    one, x = layer(kernels), draw(2, WIDTH)
    one(x)
    packed = one.preparations
    for number in range(3):
        one.bias = nn.Parameter(draw(OUT, seed=number))
        same = layer(kernels, bias=False)(x) + one.bias
        torch.testing.assert_close(one(x), same, rtol=1e-6, atol=1e-6)  # one addition more or less in float32
        one(x).sum().backward()
        torch.testing.assert_close(one.bias.grad, torch.full((OUT,), 2.0))
    one.bias = None
    assert torch.equal(one(x), layer(kernels, bias=False)(x))
    assert one.preparations == packed


def test_who_multiplies_is_said_in_words_and_a_choice_that_fails_changes_nothing() -> None:
    refused = CompressedLinear.from_parts(Parts(Pruned(Plain(draw(4, WIDTH).half()), torch.ones(4, WIDTH).bool(), "0.5")), None)
    model = nn.Sequential(layer("reference"), layer("reference"), refused)
    use_kernels(model, "auto")
    assert describe(model).endswith("its base is pruned but not quantized; the kernels take pruned weights of 2 to 8 bits")
    assert ", precise; 2 of 3 layers; reference; 1 of 3 layers" in describe(model)
    prefer_fast(model)
    assert ", fast; 2 of 3 layers" in describe(model)
    with pytest.raises(KernelError, match="2: the precise kernels were asked for"):
        use_kernels(model, "precise")
    assert ", fast; 2 of 3 layers" in describe(model)
    assert "; 2 of 3 layers; reference for 1: its base is pruned" in describe_backends([one.entries for one in model])
    assert describe(nn.Linear(2, 2)) is None


def test_fast_layers_are_precise_within_the_context_and_no_other_changes() -> None:
    model = nn.Sequential(layer("fast"), layer("auto"), layer("reference"))
    with precise_kernels(model):
        assert [one.kernels for one in model] == ["precise", "auto", "reference"]
    assert [one.kernels for one in model] == ["fast", "auto", "reference"]


def test_precise_layers_that_were_asked_for_stay_precise() -> None:
    model = nn.Sequential(layer("precise"))
    prefer_fast(model)
    assert ", precise; 1 of 1 layers" in describe(model)


def small(dtype: torch.dtype, *, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(50, WIDTH), "norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 50)})
    if tied:
        model["head"].weight = model["embed"].weight
    return model.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_weights_of_16_bits_among_float32_activations_give_what_widened_ones_give(
    dtype: torch.dtype, tied: bool, rows: int
) -> None:
    model, ids = small(dtype, tied=tied), torch.arange(rows)
    wide = copy.deepcopy(model).float()
    widen_activations(model)
    use_kernels(model, "auto")
    assert isinstance(model["head"], DenseLinear) and isinstance(model["embed"], WideEmbedding)
    assert (model["head"].weight is model["embed"].weight) == tied
    assert model["head"].weight.dtype == dtype and model["norm"].weight.dtype == torch.float32
    found, expected = (m["head"](m["norm"](m["embed"](ids))) for m in (model, wide))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 96 terms
    x = draw(rows, WIDTH).requires_grad_()
    model["head"](x).sum().backward()
    torch.testing.assert_close(x.grad, wide["head"].weight.sum(dim=0).expand(rows, WIDTH), rtol=1e-5, atol=1e-5)


def test_a_weight_that_learns_or_was_narrowed_is_the_one_that_multiplies() -> None:
    model = small(torch.float16, tied=False)
    widen_activations(model)
    head, x = model["head"], draw(1, WIDTH)
    head.use_kernels("auto")
    before = head(x)
    blob = head.prepare().blob
    head.float()
    assert head.prepare().blob is blob, "a wider dtype changes no value"
    head.weight.requires_grad_()
    with torch.no_grad():
        head.weight.mul_(2)
    torch.testing.assert_close(head(x) - head.bias, 2 * (before - head.bias), rtol=1e-5, atol=1e-5)  # float32 sums
    head.requires_grad_(False).bfloat16()
    assert head.prepare().blob is not blob
    torch.testing.assert_close(head(x), x @ head.weight.float().T + head.bias.float(), rtol=1e-5, atol=1e-5)


def test_a_model_cast_afterwards_computes_in_the_new_dtype() -> None:
    model = small(torch.bfloat16, tied=True)
    widen_activations(model)
    model.to(torch.float16)
    assert model["head"](model["norm"](model["embed"](torch.arange(3)))).dtype == torch.float16


def test_a_dense_head_whose_weight_is_an_embedding_s_follows_it() -> None:
    model, x = small(torch.bfloat16, tied=True), draw(1, WIDTH)
    widen_activations(model)
    embed, head = model["embed"], model["head"]
    head.use_kernels("auto")
    assert head.selection().backend.name == "cpu"

    def product() -> Tensor:
        return x @ head.weight.float().T + head.bias.float()

    with torch.no_grad():
        for change in (lambda: embed.weight.mul_(1.01), lambda: embed.to(torch.float16), lambda: model.to(torch.bfloat16)):
            head(x)
            blob = head.prepare().blob
            change()
            torch.testing.assert_close(head(x), product(), rtol=1e-5, atol=1e-5)  # float32 sums
            assert head.prepare().blob is not blob


class Sections:
    """Notes the sections that begin."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, call: Call) -> None:
        self.begun.append(call.section)

    def end(self) -> None: ...


def test_a_layer_is_profiled_as_unpacked_once() -> None:
    made, sections = layer("reference"), Sections()
    with profiling(sections):
        for _ in range(2):
            made(draw(2, WIDTH))
    assert sections.begun.count("unpacking") == 1
