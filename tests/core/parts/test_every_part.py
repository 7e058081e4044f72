"""Laws of every part that the folder holds: entry and tensors give it back, sizes are known ahead, damage is found.

A part is found by its file. Examples of each are below; a kind without one fails the first test.
"""

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from slimlm.core.bits import packed_bytes
from slimlm.core.errors import CheckpointError
from slimlm.core.grid import GroupSize, scale_shape, spread
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part, kinds, parse_entry
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.kernel_layout import KernelOperand, MatrixOperand, ProductOperand, Refusal
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import LayerEntry, PartEntries, Parts, TensorEntry
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.trainable import EVERYTHING, NOTHING, Trains
from slimlm.core.parts.uniform import Uniform

SHAPE = (6, 20)
GROUPS: tuple[GroupSize, ...] = ("per-tensor", "per-channel", 8)
"""Of 20 inputs the last group of 8 is shorter."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(shape: tuple[int, int], group_size: GroupSize) -> Tensor:
    scale = draw(*scale_shape(shape, group_size), seed=1).abs() + 0.1
    return scale if scale.numel() == 1 else scale.half()


def uniform(
    shape: tuple[int, int], bits: int, group_size: GroupSize, *, channels: bool = False, zeros: bool = False
) -> Uniform:
    generator = torch.Generator().manual_seed(bits)

    def drawn(sizes: tuple[int, int]) -> Tensor:
        return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), sizes, generator=generator).to(torch.int8)

    codes = drawn(shape)
    inputs = (draw(shape[1], seed=2).abs() + 0.5).half() if channels else None
    zero = drawn(scale_shape(shape, group_size)) if zeros else None
    return Uniform(codes, scales(shape, group_size), bits, group_size, inputs, zero)


def codebook(shape: tuple[int, int], bits: int, group_size: GroupSize) -> Codebook:
    index = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    values = torch.linspace(-1, 1.2, 2**bits).pow(3).half()
    return Codebook(index, values, scales(shape, group_size), bits, group_size)


def elementwise(shape: tuple[int, int]) -> Iterator[Elementwise]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield Plain(draw(*shape).to(dtype))
    for group_size in GROUPS:
        yield from (uniform(shape, bits, group_size, channels=bits == 3) for bits in (2, 3, 4, 8))
        yield from (uniform(shape, bits, group_size, channels=bits == 4, zeros=True) for bits in (2, 3, 4, 8))
        yield from (codebook(shape, bits, group_size) for bits in (1, 3, 4))


def pruned(inner: Elementwise, pattern: str | float) -> Pruned:
    return Pruned(inner, choose(draw(*inner.shape, seed=3), Pattern.parse(pattern)), str(pattern))


def examples() -> dict[str, Part]:
    found: list[Part] = [*elementwise(SHAPE)]
    found += [pruned(inner, pattern) for inner in elementwise(SHAPE) for pattern in ("2:4", "1:5", 0.35)]
    factors = zip(elementwise((3, SHAPE[0])), reversed([*elementwise((3, SHAPE[1]))]), strict=True)
    found += [LowRank(left, right) for left, right in factors]
    return {f"{part.describe().kind}-{i}: {part.summary()}": part for i, part in enumerate(found)}


EXAMPLES = examples()
every_part = pytest.mark.parametrize("part", EXAMPLES.values(), ids=list(EXAMPLES))


def through_json(part: Part) -> Part:
    entry = parse_entry(json.loads(json.dumps(part.describe().to_json())))
    assert entry == part.describe()
    return entry.from_stored(part.tensors(), part.shape)


def test_every_kind_has_examples_and_is_called_as_its_file() -> None:
    assert {part.describe().kind for part in EXAMPLES.values()} == set(kinds())
    assert all(entry.kind == name for name, entry in kinds().items())


@every_part
def test_entry_and_tensors_give_the_part_back_bit_for_bit(part: Part) -> None:  # law 23
    back = through_json(part)
    assert type(back) is type(part) and back.shape == part.shape == SHAPE
    assert torch.equal(back.dense(), part.dense())
    assert part.dense().dtype == torch.float32 and part.dense().shape == SHAPE
    again, before = back.tensors(), part.tensors()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) and again[name].dtype == before[name].dtype for name in before)


@every_part
def test_what_is_expected_is_what_is_stored(part: Part) -> None:  # law 29
    entry, tensors = part.describe(), part.tensors()
    expected = entry.expected(SHAPE)
    assert expected.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert expected[name].fits(tuple(tensor.shape)) and expected[name].shape == tuple(tensor.shape)
        assert tensor.dtype == expected[name].dtypes[0]
    assert entry.stored_bits(SHAPE) == part.storage_bits()
    assert part.storage_bits() == sum(8 * len(t.contiguous().view(torch.uint8).flatten()) for t in tensors.values())


@every_part
def test_a_sound_part_has_nothing_wrong(part: Part) -> None:
    assert list(part.describe().check(part.tensors(), SHAPE, "weight")) == []


def damaged(part: Part) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every tensor of floating-point numbers with NaN and with infinity in it, by the tensor's name."""
    for name, tensor in part.tensors().items():
        for bad in (float("nan"), float("-inf")):
            if tensor.is_floating_point():
                spoiled = tensor.clone()
                spoiled.view(-1)[-1] = bad
                yield name, {**part.tensors(), name: spoiled}


@every_part
def test_numbers_that_are_none_are_found_by_the_name_of_their_tensor(part: Part) -> None:
    for name, tensors in damaged(part):
        [words] = part.describe().check(tensors, SHAPE, "weight")
        assert words.startswith(f"weight_{name} holds 1 values of") and "NaN or infinite" in words


@every_part
def test_a_missing_tensor_or_row_is_refused(part: Part) -> None:  # law 23
    entries = Parts(part).describe()
    if "" not in part.tensors():
        entries = Parts(Plain(draw(*SHAPE)), adapter=part).describe()
    for name, tensor in part.tensors().items():
        whole = Parts(part) if "" in part.tensors() else Parts(Plain(draw(*SHAPE)), adapter=part)
        full = {**whole.tensors()}
        [key] = [key for key in full if key.removeprefix("adapter").removeprefix("weight").removeprefix("_") == name]
        for change in ("missing", "short row", "missing row"):
            tensors = dict(full)
            if change == "missing":
                del tensors[key]
            else:
                tensors[key] = tensor[..., :-1] if change == "short row" else tensor[:-1]
            with pytest.raises(CheckpointError):
                entries.from_stored(tensors, SHAPE)


def dense_of(operand: KernelOperand) -> Tensor:
    """The matrix that kernels are given, by the definition in kernel_layout.py."""
    if isinstance(operand, ProductOperand):
        return dense_of(operand.left).T @ dense_of(operand.right)
    layout, values = operand.layout, operand.elements
    if layout.elements == "indices":
        assert operand.codebook is not None and len(operand.codebook) == 2**layout.bits
        values = operand.codebook[values.long()]
    values = values.float()
    if layout.elements != "floats":
        assert operand.scale is not None
        if layout.zero:
            assert operand.zero is not None
            values = values - spread(operand.zero, values.shape[1], layout.group_size)
        values = values * spread(operand.scale, values.shape[1], layout.group_size)
    if layout.channel_scale:
        assert operand.channel_scale is not None
        values = values * operand.channel_scale.float()
    if layout.mask is not None:
        assert operand.mask is not None
        values = values * operand.mask
    return values


@every_part
def test_kernels_are_told_the_matrix_that_the_part_stands_for(part: Part) -> None:  # law 24
    operand, layout = part.kernel_operand(), part.describe().kernel_layout()
    if isinstance(layout, Refusal):
        assert operand == layout and layout.reason
        return
    assert not isinstance(operand, Refusal)
    torch.testing.assert_close(dense_of(operand), part.dense(), rtol=1e-6, atol=0)
    if isinstance(operand, MatrixOperand):
        assert operand.layout == layout
        names = ("scale", "zero", "codebook", "channel_scale", "mask")
        held = {name for name in names if getattr(operand, name) is not None}
        assert held | {""} == part.tensors().keys()


@every_part
@pytest.mark.parametrize("trains", [NOTHING, EVERYTHING, ~Trains.CODES, Trains.SCALES])
def test_a_part_that_was_not_tuned_is_stored_as_it_was(part: Part, trains: Trains) -> None:
    tuned = part.trainable(trains)
    # A trained copy multiplies in float32 throughout; a plain part may be wider.
    torch.testing.assert_close(tuned.dense().detach(), part.dense(), rtol=1e-5, atol=1e-6)
    stored = tuned.part()
    assert stored.describe() == part.describe() and stored.storage_bits() == part.storage_bits()
    torch.testing.assert_close(stored.dense(), part.dense(), rtol=0, atol=0)


@every_part
def test_gradients_reach_what_may_move(part: Part) -> None:
    tuned = part.trainable(EVERYTHING)
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((tuned.dense() * draw(*SHAPE, seed=5)).sum(), parameters, allow_unused=True)
    assert parameters and all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


FIRST = Trains.SCALES | Trains.CODEBOOKS
MOVED = {
    Trains.SCALES: {"scale"},
    Trains.CODEBOOKS: {"codebook"},
    FIRST: {"scale", "codebook"},
    Trains.WEIGHTS: {""},
    Trains.NORMS: set[str](),
    NOTHING: set[str](),
}
"""The tensors of a part outside adapters that may change where these values are trained; of adapters scales and codebooks."""


@every_part
@pytest.mark.parametrize("trains", MOVED)
def test_what_is_not_trained_keeps_every_bit(part: Part, trains: Trains) -> None:  # law 27
    tuned = part.trainable(trains)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert bool(trained) == bool(part.describe().trains & trains)
    with torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.mul_(1 + draw(*parameter.shape, seed=i).abs() / 4)
    before, after = part.tensors(), tuned.part().tensors()
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {name: (t.dtype, t.shape) for name, t in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = MOVED[trains]
    low_rank = isinstance(part, LowRank)
    kinds = {name.removeprefix("left_").removeprefix("right_") if low_rank else name for name in changed}
    assert kinds <= (allowed & {"scale", "codebook"} if low_rank else allowed)
    assert bool(changed) == bool(trained)


@every_part
def test_a_fresh_summary_is_that_of_the_entry_and_short(part: Part) -> None:
    assert part.summary() == part.describe().summary() and 0 < len(part.summary()) < 60


@pytest.mark.parametrize("outliers", ["plain", "low_rank", "pruned"])
def test_outliers_and_an_adapter_stand_together(outliers: str) -> None:  # law 23
    base, adapter = pruned(uniform(SHAPE, 4, 8), "2:4"), LowRank(uniform((2, SHAPE[0]), 4, 8), uniform((2, SHAPE[1]), 4, 8))
    beside: dict[str, Part] = {
        "plain": Plain(draw(*SHAPE, seed=7).half()),
        "low_rank": LowRank(Plain(draw(3, SHAPE[0])), codebook((3, SHAPE[1]), 3, 8)),
        "pruned": pruned(Plain(draw(*SHAPE, seed=8).bfloat16()), 0.9),
    }
    parts = Parts(base, adapter=adapter, outliers=beside[outliers])
    torch.testing.assert_close(parts.dense(), base.dense() + beside[outliers].dense() + adapter.dense(), rtol=0, atol=0)
    tensors = parts.tensors()
    assert {name.split("_")[0] for name in tensors} == {"weight", "outliers", "adapter"}
    entry = LayerEntry(
        shape=SHAPE, bias=False, parts=parts.describe(), tensors={name: TensorEntry.of(t) for name, t in tensors.items()}
    )
    again = LayerEntry.parse(json.loads(json.dumps(entry.to_json())))
    assert again == entry
    again.check()
    assert list(entry.to_json()) == ["shape", "bias", "base", "outliers", "adapter", "tensors"]
    back = again.parts.from_stored(tensors, SHAPE)
    assert torch.equal(back.dense(), parts.dense()) and back.storage_bits() == parts.storage_bits() == entry.stored_bits
    assert list(again.parts.check(tensors, SHAPE)) == []
    assert again.parts.summary() == " + ".join(part.summary() for part in (base, beside[outliers], adapter))
    assert again.parts.added_rank == 2 + (3 if outliers == "low_rank" else 0)


def test_a_slot_that_is_empty_is_left_out() -> None:
    entries = Parts(Plain(draw(*SHAPE))).describe()
    assert list(entries.to_json()) == ["base"] and entries.added == () and list(entries) == [entries.base]
    assert PartEntries.parse(Fields({"base": entries.base.to_json(), "adapter": None}, "it")) == entries


# Damage that a tensor's dtype and shape do not show


def test_bits_beyond_a_row_s_end_are_found() -> None:
    part = uniform((4, 5), 3, "per-channel")
    tensors = part.tensors()
    tensors[""][2, -1] |= 0b1000_0000
    [words] = part.describe().check(tensors, part.shape, "weight")
    assert words == "weight has bits set beyond the end of 1 rows, the first of them 2"


def test_bits_beyond_the_last_zero_are_found() -> None:
    part = uniform((3, 5), 3, "per-channel", zeros=True)
    tensors = part.tensors()
    tensors["zero"][-1] |= 0b10
    [words] = part.describe().check(tensors, part.shape, "weight")
    assert words == "weight_zero has bits set beyond the end of 1 rows, the first of them 0"


def test_a_mask_that_is_none_of_its_pattern_is_found_with_its_place() -> None:
    part = pruned(uniform((4, 8), 4, "per-channel"), "2:4")
    tensors = part.tensors()
    tensors["mask"][1, 0] = 0b0111_0011
    [words] = part.describe().check(tensors, part.shape, "weight")
    assert words == "weight_mask does not fit 2:4: in row 1, inputs 4 to 7, 3 stay, not 2"


def test_a_mask_of_a_share_must_keep_as_many_in_every_row() -> None:
    part = pruned(uniform((4, 9), 4, "per-channel"), 0.4)
    tensors = part.tensors()
    tensors["mask"][3] = torch.tensor([0b0000_0111, 0], dtype=torch.uint8)
    [words] = part.describe().check(tensors, part.shape, "weight")
    assert words == "weight_mask does not fit 0.4 of each row: in row 3, inputs 0 to 8, 3 stay, not 6"
    with pytest.raises(CheckpointError, match="different numbers of weights in different rows"):
        part.describe().from_stored(tensors, part.shape)


def test_bits_beyond_the_end_of_a_mask_are_found() -> None:
    part = pruned(uniform((4, 9), 4, "per-channel"), 0.4)
    tensors = part.tensors()
    tensors["mask"][1, 1] |= 0b100
    assert list(part.describe().check(tensors, part.shape, "weight")) == [
        "weight_mask has bits set beyond the end of 1 rows, the first of them 1"
    ]


def test_elements_that_are_not_as_many_as_the_mask_keeps_are_found() -> None:
    part = pruned(uniform((4, 8), 4, "per-channel"), 0.5)
    tensors = {**part.tensors(), "": part.inner.tensors()[""]}
    [words] = part.describe().check(tensors, part.shape, "weight")
    assert words == "weight holds 16 bytes; 4 rows of 4 elements of 4 bits take 8"


def test_damage_of_a_factor_is_told_by_the_factor_s_name() -> None:
    part = LowRank(Plain(draw(2, 6).half()), uniform((2, 20), 3, "per-channel"))
    tensors = part.tensors()
    tensors["right"][1, -1] |= 0b1000_0000
    tensors["left"].view(torch.float16)[0, 0] = float("nan")
    first, second = part.describe().check(tensors, SHAPE, "adapter")
    assert first == "adapter_left holds 1 values of 12 that are NaN or infinite"
    assert second == "adapter_right has bits set beyond the end of 1 rows, the first of them 1"


# Entries that cannot be


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "a part is None, not an object"),
        ([], "not an object"),
        ({}, "unknown kind None; this program knows codebook, low_rank, plain, pruned, uniform"),
        ({"kind": ["uniform"]}, "unknown kind"),
        ({"kind": "pack"}, "unknown kind 'pack'"),
        ({"kind": "uniform", "bits": 1, "group_size": 8, "channel_scale": False}, "uniform has 2 to 8 bits, not 1"),
        ({"kind": "uniform", "bits": True, "group_size": 8, "channel_scale": False}, "2 to 8 bits, not True"),
        ({"kind": "uniform", "bits": 4, "group_size": 0, "channel_scale": False}, "group_size is 0"),
        (
            {"kind": "uniform", "bits": 4, "group_size": "row", "channel_scale": False},
            "group_size is 'row'; .* \"per-channel\"",
        ),
        ({"kind": "uniform", "bits": 4, "group_size": 8}, "channel_scale is None, neither true nor false"),
        (
            {"kind": "uniform", "bits": 4, "group_size": 8, "channel_scale": False, "zero": 7},
            "zero is 7, neither true nor false",
        ),
        ({"kind": "codebook", "bits": 9, "group_size": 8}, "codebook has 1 to 8 bits, not 9"),
        ({"kind": "plain", "dtype": "int8"}, "dtype is 'int8'; it can be float16 or bfloat16 or float32 or float64"),
        ({"kind": "pruned", "pattern": 0.5, "inner": {"kind": "plain", "dtype": "float16"}}, "pattern is 0.5, not a text"),
        ({"kind": "pruned", "pattern": "5:4", "inner": {"kind": "plain", "dtype": "float16"}}, "pattern = '5:4'"),
        ({"kind": "pruned", "pattern": "nan", "inner": {"kind": "plain", "dtype": "float16"}}, "pattern = "),
        ({"kind": "pruned", "pattern": "2:4"}, "a part is None"),
        ({"kind": "pruned", "pattern": "2:4", "inner": {"kind": "low_rank"}}, "a low_rank part cannot have a mask"),
        ({"kind": "low_rank", "rank": -1}, "rank is -1"),
        ({"kind": "low_rank", "rank": 2, "left": {"kind": "pruned"}}, "a pruned part cannot have a mask or be a factor"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_in_words(data: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse_entry(data)


def test_a_pattern_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(CheckpointError, match="2:4 needs in_features to be a multiple of 4; it has 30"):
        pruned(uniform((4, 8), 4, 8), "2:4").describe().expected((4, 30))


def entry_of(part: Part) -> LayerEntry:
    parts = Parts(part)
    tensors = {name: TensorEntry.of(tensor) for name, tensor in parts.tensors().items()}
    return LayerEntry(shape=parts.shape, bias=True, parts=parts.describe(), tensors=tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": TensorEntry(torch.int8, (4 * packed_bytes(8, 4),))}, "weight is int8; it can be uint8"),
        ({"weight": TensorEntry(torch.uint8, (15,))}, r"weight is \[15\]; of these parts it is \[16\]"),
        ({"weight_scale": TensorEntry(torch.bfloat16, (4, 1))}, "weight_scale is bfloat16; it can be float16 or float32"),
        ({"weight_scale": TensorEntry(torch.float16, (4, 2))}, r"weight_scale is \[4, 2\]; of these parts it is \[4, 1\]"),
        ({"weight_mask": TensorEntry(torch.uint8, (4, 1))}, "its parts are stored in weight, weight_scale; it names"),
    ],
)
def test_tensors_that_the_parts_do_not_store_are_refused(change: dict[str, TensorEntry], words: str) -> None:
    entry = entry_of(uniform((4, 8), 4, "per-channel"))
    entry.check()
    with pytest.raises(CheckpointError, match=words):
        LayerEntry(shape=entry.shape, bias=True, parts=entry.parts, tensors={**entry.tensors, **change}).check()


def test_under_a_mask_the_elements_may_be_fewer_and_no_more() -> None:
    entry = entry_of(pruned(uniform((4, 8), 4, "per-channel"), 0.5))
    for size, fits in ((8, True), (4, True), (16, True), (17, False)):
        tensors = {**entry.tensors, "weight": TensorEntry(torch.uint8, (size,))}
        changed = LayerEntry(shape=entry.shape, bias=True, parts=entry.parts, tensors=tensors)
        if fits:
            changed.check()
        else:
            with pytest.raises(CheckpointError, match=r"weight is \[17\]; of these parts it is at most \[16\]"):
                changed.check()


def test_a_tensor_of_a_dtype_that_could_not_be_read_back_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a tensor of float8_e4m3fn cannot be stored; it can be uint8 or"):
        TensorEntry.of(torch.zeros(2, dtype=torch.float8_e4m3fn))
