"""What a part stores, from its description and the shape of the weight alone: the bits that `Part.storage_bits` will count."""

from slimlm.core import grid
from slimlm.core.bits import packed_bytes
from slimlm.core.mask import Pattern
from slimlm.core.parts import Description


def stored_bits(about: Description, shape: tuple[int, int]) -> int:
    """Bits of a part described so (see `parts`) that stands for a weight `[out, in]` of this shape.

    Padding to whole bytes, masks, scales and tables are counted. Scales count 16 bits, a single one 32; where one is too small
    for float16 all of a layer's take 32, which only their values tell.
    """
    if about["kind"] == "pruned":
        kept = Pattern.parse(pattern_of(about["pattern"])).kept_of(shape[1])
        return 8 * shape[0] * packed_bytes(shape[1], 1) + _elements_bits(about["inner"], shape, kept)
    if about["kind"] == "low_rank":
        return sum(stored_bits(about[side], (about["rank"], n)) for side, n in zip(("left", "right"), shape, strict=True))
    return _elements_bits(about, shape, shape[1])


def pattern_of(text: str) -> str | float:
    """A pattern as a part's description has it: "2:4", or a share of each row as text."""
    return text if ":" in text else float(text)


def _elements_bits(about: Description, shape: tuple[int, int], kept: int) -> int:
    """Of a part that holds one code or value for each of the `kept` weights in a row."""
    out, width = shape
    if about["kind"] == "plain":
        return 8 * out * kept * {"float32": 4, "float16": 2, "bfloat16": 2}[about["dtype"]]
    rows, groups = grid.scale_shape(shape, about["group_size"])
    bits = 8 * out * packed_bytes(kept, about["bits"]) + (32 if rows * groups == 1 else 16 * rows * groups)
    if about["kind"] == "codebook":
        return bits + table_bits(about["bits"])
    return bits + (16 * width if about["input_scale"] else 0)


def table_bits(bits: int) -> int:
    """Of a table of levels for codes of so many bits."""
    return 16 * 2**bits
