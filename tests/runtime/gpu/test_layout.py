"""What the GPU layout takes and refuses, and how it lies; no Triton is needed."""

import re
import subprocess
from collections.abc import Iterator

import pytest
import torch

from slimlm.core.errors import CheckpointError, KernelError
from slimlm.core.parts.base import Part
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.runtime.backends import Stored
from slimlm.runtime.backends.triton import Gpu
from slimlm.runtime.dispatch import select_backend
from slimlm.runtime.gpu import device, layout, tiles
from slimlm.runtime.linear import CompressedLinear
from tests.runtime.gpu.layers import REASON, WHERE, adapter, codes, draw, pruned, table, with_zeros

SHAPE = (24, 48)


def stored(*parts: Part) -> Stored:
    return CompressedLinear.from_parts(Parts(*parts), None).stored()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((Plain(draw(*SHAPE).half()),), "its base is plain; the GPU kernels take codes of up to 4 bits"),
        ((codes(SHAPE, "per-channel", bits=5),), "codes of 5 bits; the GPU kernels take up to 4"),
        ((pruned(codes(SHAPE, 16)),), "groups of 16 inputs; the GPU kernels take multiples of 32 there"),
        ((codes(SHAPE, 12),), "groups of 12 inputs; the GPU kernels take multiples of 8 there"),
        ((codes(SHAPE, 8), codes(SHAPE, 8)), "the GPU kernels add a low-rank part to a base, not a uniform part"),
        ((codes(SHAPE, 8), adapter("rows", *SHAPE), adapter("rows", *SHAPE)), "it has 2 parts besides its base"),
        (
            (Pruned(table(SHAPE, 8), torch.ones(SHAPE, dtype=torch.bool), "0.5"),),
            "a codebook under the mask 0.5 of each row; the GPU kernels take codebooks under 2:4 or no mask",
        ),
        (
            (codes(SHAPE, 8), LowRank(codes((5, 24), 8, bits=8), codes((5, 48), 8))),
            "its adapter: codes of 8 bits; the GPU kernels take up to 4",
        ),
        (
            (codes(SHAPE, 8), LowRank(with_zeros(codes((5, 24), 8)), codes((5, 48), 8))),
            "a factor of its adapter has zeros beside its scales",
        ),
    ],
)
def test_what_the_layout_does_not_hold_is_refused_in_words(parts: tuple[Part, ...], words: str) -> None:
    reason = layout.unfit(stored(*parts).entries, SHAPE)
    assert reason is not None and reason.startswith(words)


def test_a_group_as_long_as_a_row_is_a_row() -> None:
    assert layout.unfit(stored(pruned(codes((24, 44), 50))).entries, (24, 44)) is None


def test_ranks_that_fill_up_have_a_scale_of_zero() -> None:
    right = table((5, 48), "per-tensor")
    made = layout.lay_out(stored(codes(SHAPE, 8), LowRank(codes((5, 24), 8), right))).right
    assert isinstance(made, layout.Packed)
    assert made.scale.tolist() == [float(right.scale)] * 5 + [0.0] * 59


@pytest.mark.parametrize(("height", "sparse", "dense"), [(2**20 - 64, True, True), (2**20, True, False), (2**21, False, False)])
def test_addresses_are_counted_by_the_bits_that_a_weight_takes(height: int, sparse: bool, dense: bool) -> None:
    for fits, part in ((sparse, pruned(codes(SHAPE, "per-channel"))), (dense, codes(SHAPE, "per-channel"))):
        reason = layout.unfit(stored(part).entries, (height, 2**14))
        assert (reason is None) == fits


def test_a_2_4_weight_of_one_scale_takes_three_bits_a_weight() -> None:
    made = layout.lay_out(stored(pruned(codes((128, 1024), "per-tensor"))))
    assert 8 * made.bytes() / (128 * 1024) == pytest.approx(3, abs=1e-3)


def test_a_word_by_hand() -> None:
    """Places 1 and 2 of the first group, 0 and 3 of the second; the codes are 3 and -1, 7 and -8."""
    weight = torch.zeros(1, 8, dtype=torch.int8)
    weight[0, [1, 2, 4, 7]] = torch.tensor([3, -1, 7, -8], dtype=torch.int8)
    part = Pruned(Uniform(weight, torch.ones(1, 1).half(), 4, "per-tensor"), weight != 0, "2:4")
    words = layout.lay_out(stored(part)).base.words
    assert words.shape == (1, 3, layout.ROWS, 8)
    assert words[0, :, 0, 0].tolist() == [0x73, 0x8F, 0x96]
    assert int(words.count_nonzero()) == 3


def test_a_dense_word_by_hand() -> None:
    weight = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]], dtype=torch.int8)
    words = layout.lay_out(stored(Uniform(weight, torch.ones(1, 1).half(), 4, "per-tensor"))).base.words
    low, high = 0x7531, 0x8642
    assert int(words[0, 0, 0]) == (high << 16 | low) - 2**32


def test_a_mask_that_is_not_2_4_is_damage() -> None:
    part = Pruned(codes(SHAPE, "per-tensor"), torch.ones(SHAPE, dtype=torch.bool), "2:4")
    with pytest.raises(CheckpointError, match="does not keep two of every four"):
        layout.lay_out(stored(part))


def test_every_split_covers_all_blocks_and_no_part_is_empty() -> None:
    for blocks in range(1, 60):
        for batch in (1, 16, 32, 64, 256):
            tile = tiles.tile_for(batch, 128, (9, 0))
            parts, share = tiles.splits_for(tile, 7, blocks, 132)
            assert (parts - 1) * share < blocks <= parts * share


def test_a_launch_has_no_more_tiles_than_a_layer_has_counters() -> None:
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        for batch in range(1, tiles.FUSED_UP_TO + 1):
            for rows in (64, 128, 192):
                tile = tiles.tile_for(batch, rows, capability)
                assert rows % tile.rows == 0 and -(-batch // tile.tokens) <= layout.MOST_TILES


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "Triton is not installed"), ("3.5.1", "Triton 3.5.1 is too old"), ("3.10.0+git1", None), ("3.6.0", None)],
)
def test_a_missing_or_old_triton_is_the_reason(version: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "triton_version", lambda: version)
    reason = device.lacks_triton()
    assert (reason is None) if words is None else words in str(reason)


@pytest.mark.parametrize(
    ("capability", "words"), [((7, 5), "has compute capability 7.5, and the kernels need 8.0 or later"), ((8, 0), None)]
)
def test_an_old_card_is_the_reason(capability: tuple[int, int], words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "a GPU")
    reason = device.lacks_gpu(torch.device("cuda"))
    assert (reason is None) if words is None else words in str(reason)


def test_a_torch_without_cuda_and_another_device_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built for the CPU alone" in str(device.lacks_gpu(torch.device("cuda")))
    monkeypatch.setattr(device, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(device, "interpreted", lambda: False)
    assert "the layer is on cpu" in str(Gpu().refuses(stored(codes(SHAPE, 8))))


def on_fake_gpu(monkeypatch: pytest.MonkeyPatch, reason: str | None, *parts: Part) -> Stored:
    """A layer that reports to be on a GPU, which can or cannot run the kernels."""
    monkeypatch.setattr(device, "refuses", lambda where: reason)
    made = stored(*parts)
    made.__dict__["device"] = torch.device("cuda")
    return made


def test_on_a_gpu_auto_is_the_gpu_kernels_and_elsewhere_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_backend(stored(codes(SHAPE, 8)), "auto").backend.name != "gpu"
    assert select_backend(on_fake_gpu(monkeypatch, None, codes(SHAPE, 8)), "auto").backend.name == "gpu"


def test_where_they_cannot_run_the_reference_does_for_the_reason_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, part in (("no GPU", codes(SHAPE, 8)), (None, codes(SHAPE, 8, bits=5))):
        layer = on_fake_gpu(monkeypatch, reason, part)
        selection = select_backend(layer, "auto")
        assert selection.backend.name == "reference" and selection.refused == (
            reason or "codes of 5 bits; the GPU kernels take up to 4"
        )
        with pytest.raises(KernelError, match=f"the gpu kernels were asked for, but {selection.refused}"):
            select_backend(layer, "gpu")


def test_without_triton_layers_asked_onto_the_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "triton_version", lambda: None)
    with pytest.raises(KernelError, match="the gpu kernels were asked for, but Triton is not installed"):
        select_backend(stored(codes(SHAPE, 8)), "gpu")


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is reported, on which Triton has not been tried yet."""
    monkeypatch.setattr(device, "triton_version", lambda: "3.7.1")
    monkeypatch.setattr(device, "lacks_gpu", lambda where: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "a GPU")
    device.cannot_start.cache_clear()
    yield
    device.cannot_start.cache_clear()


FAILURES = {
    "Failed to find C compiler": RuntimeError("Failed to find C compiler. Please specify via CC"),
    r"FileNotFoundError: \[Errno 2\]": OSError(2, "No such file or directory"),
    r"CalledProcessError: Command '\['gcc'": subprocess.CalledProcessError(1, ["gcc", *["x"] * 1000]),
    "AssertionError$": AssertionError(),
    "sm_130 is not defined": RuntimeError("\nptxas fatal: sm_130 is not defined\nand more"),
}


@pytest.mark.parametrize("said", FAILURES)
def test_where_triton_can_start_nothing_its_words_are_the_reason(
    said: str, fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[torch.device] = []

    def fails(where: torch.device) -> None:
        tried.append(where)
        raise FAILURES[said]

    monkeypatch.setattr(device, "start_one", fails)
    layer = stored(codes(SHAPE, 8))
    layer.__dict__["device"] = torch.device("cuda")
    selection = select_backend(layer, "auto")
    assert selection.backend.name == "reference" and re.search(
        f"cannot start a kernel on a GPU: .*{said}", str(selection.refused)
    )
    assert len(str(selection.refused)) < 400 and "and more" not in str(selection.refused)
    with pytest.raises(KernelError, match="the gpu kernels were asked for, but Triton cannot start a kernel"):
        select_backend(layer, "gpu")
    assert tried == [torch.device("cuda", 0)], "a GPU is tried once"
    assert device.refuses(torch.device("cuda", 1)) and tried[1:] == [torch.device("cuda", 1)], "and another by itself"


def test_a_gpu_on_which_a_kernel_starts_is_taken(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "start_one", lambda where: None)
    assert device.refuses(torch.device("cuda")) is None


@pytest.mark.skipif(REASON is not None, reason=f"no GPU kernels: {REASON}")
def test_the_kernel_that_is_tried_runs() -> None:
    from slimlm.runtime.gpu import trial

    trial.start(WHERE)


@pytest.mark.parametrize(
    ("there", "where", "words"),
    [
        (0, "cuda", "torch finds no CUDA device here"),
        (2, "cuda:2", "torch finds 2 CUDA devices, counted from 0"),
        (2, "cuda:1", None),
        (2, "cuda", None),
        (0, "cpu", None),
    ],
)
def test_a_gpu_that_is_not_there_is_absent(there: int, where: str, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert device.absent(torch.device(where)) == words
