"""`CompressedEmbedding`: the rows of the part that it stores, in the dtype that it was cast to."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slimlm.core import grid
from slimlm.core.errors import CheckpointError, KernelError
from slimlm.core.parts.pack import EmbeddingEntry, Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.uniform import Uniform
from slimlm.kernels import native
from slimlm.runtime.dense import widen_activations
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.kernel_names import Kernels

TOKENS = 50


def part(bits: int, width: int = 80, group_size: grid.GroupSize = 32) -> Uniform:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (TOKENS, width), generator=generator, dtype=torch.int8)
    scale = (0.5 + torch.rand(grid.scale_shape((TOKENS, width), group_size), generator=generator)).half()
    return Uniform(codes, scale, bits, group_size)


IDS = torch.tensor([[3, 0, 49, 3], [7, 8, 9, 10]])


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
@pytest.mark.parametrize(("width", "group_size"), [(96, 32), (80, 32), (17, 32), (80, "per-channel"), (33, 7)])
def test_the_rows_looked_up_are_those_of_the_dense_matrix(bits: int, width: int, group_size: grid.GroupSize) -> None:
    stored = part(bits, width, group_size)
    embedding = CompressedEmbedding.from_part(stored, torch.float32)
    assert torch.equal(embedding(IDS), stored.dense()[IDS])
    assert torch.equal(embedding(torch.tensor(5)), stored.dense()[5])
    [again] = embedding.parts()
    assert torch.equal(again.dense(), stored.dense())


def test_a_description_and_its_tensors_give_the_embedding_back() -> None:
    embedding = CompressedEmbedding.from_part(part(6), torch.float32, factor=2.5)
    empty = CompressedEmbedding.empty(
        EmbeddingEntry.parse(json.loads(json.dumps(embedding.describe().to_json()))), torch.float32
    )
    assert all(tensor.device.type == "meta" for tensor in empty.packed().values())
    empty.load_state_dict(embedding.state_dict(), assign=True)
    assert torch.equal(empty(IDS), embedding(IDS))
    assert empty.describe() == embedding.describe()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_changes_what_it_gives_and_nothing_that_it_stores(dtype: torch.dtype) -> None:
    embedding = CompressedEmbedding.from_part(part(8), torch.float32)
    before, rows = {name: t.clone() for name, t in embedding.packed().items()}, embedding(IDS)
    embedding.to(dtype)
    assert {name: t.dtype for name, t in embedding.packed().items()} == {name: t.dtype for name, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in embedding.packed().items())
    assert torch.equal(embedding(IDS), rows.to(dtype))
    widen_activations(embedding)
    assert torch.equal(embedding(IDS), rows) and embedding.weight_scale.dtype == torch.float16


def test_a_factor_multiplies_in_the_dtype_of_the_activations() -> None:
    plain = CompressedEmbedding.from_part(part(8), torch.bfloat16)
    scaled = CompressedEmbedding.from_part(part(8), torch.bfloat16, factor=6.9282)
    assert torch.equal(scaled(IDS), plain(IDS) * torch.tensor(6.9282, dtype=torch.bfloat16))


def test_a_copy_has_tensors_of_its_own() -> None:
    embedding = CompressedEmbedding.from_part(part(8), torch.float32)
    twin = copy.deepcopy(embedding)
    rows = embedding(IDS)
    twin.weight.zero_()
    assert torch.equal(embedding(IDS), rows) and not torch.equal(twin(IDS), rows)


def test_a_token_that_there_is_not_is_refused() -> None:
    with pytest.raises(IndexError):
        CompressedEmbedding.from_part(part(8), torch.float32)(torch.tensor([TOKENS]))


@pytest.mark.parametrize("shape", [(TOKENS // 2, 160), (TOKENS, 72), (TOKENS, 96)])
def test_tensors_of_another_size_are_refused_in_words(shape: tuple[int, int]) -> None:
    about = CompressedEmbedding.from_part(part(6), torch.float32).describe()
    with pytest.raises(CheckpointError, match=rf"of an embedding of {shape[0]} x {shape[1]} \(6-bit \(groups of 32\)\)"):
        CompressedEmbedding.empty(replace(about, shape=shape), torch.float32)


def test_parts_without_rows_of_their_own_are_refused_in_words() -> None:
    with pytest.raises(CheckpointError, match="one per row or group"):
        CompressedEmbedding.from_part(part(8, group_size="per-tensor"), torch.float32)
    with pytest.raises(CheckpointError, match="one part of integer codes without a mask, not float32"):
        CompressedEmbedding((2, 3), Parts(Plain(torch.zeros(2, 3))).describe(), {}, torch.float32)


needs_kernels = pytest.mark.skipif(native.library() is None, reason="there are no CPU kernels")
WIDTH = 80


def ends(order: tuple[str, str]) -> nn.ModuleDict:
    """An embedding and the head that is tied to it, to be visited in this order."""
    embedding = CompressedEmbedding.from_part(part(8), torch.float32)
    modules = {"embed": embedding, "head": TiedLinear(embedding, None)}
    return nn.ModuleDict({name: modules[name] for name in order})


def on_fake_gpu(tensor: Tensor) -> Tensor:
    """A tensor without numbers that reports to be on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@needs_kernels
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("order", [("embed", "head"), ("head", "embed")], ids=lambda order: f"{order[0]} first")
def test_a_tied_head_that_moved_to_another_device_chooses_again(order: tuple[str, str]) -> None:
    model = ends(order)
    head = model["head"]
    head.use_kernels("auto")
    head(torch.ones(2, WIDTH))
    assert head.selection().backend.name == "cpu" and head.stored().blob is not None
    with FakeTensorMode(allow_non_fake_inputs=True):
        model._apply(on_fake_gpu)
        assert head.weight.device.type == "cuda"
        assert head.selection().backend.name != "cpu"
        assert head.stored().blob is None
        head.kernels = "precise"
        head.forget()
        with pytest.raises(KernelError, match="the layer is on cuda"):
            head.prepare()


@needs_kernels
@pytest.mark.parametrize("kernels", ["precise", "reference"])
def test_a_tied_head_follows_whatever_happens_to_its_embedding_alone(kernels: Kernels) -> None:
    model, x = ends(("embed", "head")), torch.ones(2, WIDTH)
    head, embedding = model["head"], model["embed"]
    head.use_kernels(kernels)
    before = head(x)
    embedding.weight_scale.mul_(2)
    torch.testing.assert_close(head(x), 2 * before)
    embedding.load_state_dict({**embedding.state_dict(), "weight_scale": embedding.weight_scale * 2})
    torch.testing.assert_close(head(x), 4 * before)
    embedding.weight_scale = embedding.weight_scale / 4
    torch.testing.assert_close(head(x), before)


@needs_kernels
def test_a_layer_packed_for_the_cpu_refuses_activations_from_elsewhere() -> None:
    head = ends(("embed", "head"))["head"]
    head.use_kernels("precise")
    with pytest.raises(KernelError, match="packed for the CPU, and the activations are on meta"):
        head(torch.ones(2, WIDTH, device="meta"))
