"""The Triton kernels: y = x W^T (+ t L^T) (+ bias) with W as it is packed, and W unpacked into a matrix.

Importing this file imports Triton; `products.py` does so at the first launch. `layout.py` describes the layout.

The weight is the left operand of the tensor cores: a tile `[rows, 16]` of it is made in registers and multiplied by 16 inputs
of a few tokens, `[16, tokens]`. The 16 are two neighbouring inputs under each of the 8 words of a row, so that a word turns
into operands without crossing threads, and each 32-bit register of theirs holds two inputs that lie side by side in x.

Codes become floats by their bits: for n = code + 8, 0x6400 | n is 1024 + n in float16 and 0x4300 | n is 128 + n in bfloat16.
The constants come from memory and not from the source: as two immediates of one logical operation they would make two of it.

Triton's interpreter, on which the tests run without a GPU, has no arithmetic in bfloat16; there products are taken in float32.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

TENSOR = tl.constexpr(0)
ROW = tl.constexpr(1)
BLOCK = tl.constexpr(2)
SPANS = tl.constexpr(3)

NO_TAIL = tl.constexpr(0)
PACKED_TAIL = tl.constexpr(1)
DENSE_TAIL = tl.constexpr(2)


@triton.jit
def _spread(first, second, places):
    """For 8 groups at once: word p of the result holds what lies at place p of each group, zero where nothing is kept."""
    ones: tl.constexpr = 0x11111111
    at0 = (places & ones) * 15
    at1 = ((places >> 1) & ones) * 15
    at2 = ((places >> 2) & ones) * 15
    at3 = ((places >> 3) & ones) * 15
    value1 = (at0 & second) | (~at0 & first)
    value2 = (at3 & first) | (~at3 & second)
    return first & at0, value1 & at1, value2 & at2, second & at3


@triton.jit
def _side_by_side(left, right):
    """Two tiles `[rows, n]` as one `[rows, 2 n]`, columns of the two in turn."""
    return tl.reshape(tl.join(left, right), [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """Words `[rows, n]` of two 16-bit floats as `[rows, 2 n]`, the lower half first."""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return _side_by_side(low, high)


@triton.jit
def _floats(words, number: tl.constexpr, even_bits, odd_bits, dtype: tl.constexpr):
    """Nibbles `number` and `number + 4` of words `[rows, n]` as the codes that they are, `[rows, 2 n]`, -8 to 7."""
    if dtype == tl.float16:
        if number >= 2:
            words = words >> 8
        if number % 2 == 0:
            codes = _halves((words & 0x000F000F) ^ even_bits, dtype) - 1032.0
        else:
            codes = _halves((words & 0x00F000F0) ^ odd_bits, dtype) * 0.0625 - 72.0
    else:
        shifted = _halves(((words >> (4 * number)) & 0x000F000F) ^ even_bits, dtype)
        if INTERPRETED:
            codes = (shifted.to(tl.float32) - 136.0).to(dtype)
        else:
            codes = shifted - 136.0
    return codes


@triton.jit
def _looked_up(codebook, words, shift: tl.constexpr):
    """The values, float32, that the nibbles of words at a bit are indices of."""
    return tl.load(codebook + ((words >> shift) & 15))


@triton.jit
def _scaled(tile, scale, dtype: tl.constexpr):
    """A tile in `dtype` times scales of its shape, rounded once."""
    if INTERPRETED:
        product = (tile.to(tl.float32) * scale.to(tl.float32)).to(dtype)
    else:
        product = tile * scale.to(dtype)
    return product


@triton.jit
def _less_zeros(tile, zero, dtype: tl.constexpr):
    """A tile of codes in `dtype` less zeros of its shape, which is exact: both are small whole numbers."""
    if INTERPRETED:
        difference = (tile.to(tl.float32) - zero.to(tl.float32)).to(dtype)
    else:
        difference = tile - zero.to(dtype)
    return difference


@triton.jit
def _of_words(scale, block, half, row, column, padded, mode: tl.constexpr, spans: tl.constexpr):
    """Scales, or zeros, per word of half a block of a dense weight, `[rows, 8]`."""
    if mode == TENSOR:
        found = tl.load(scale + (row[:, None] + column[None, :]) * 0)
    elif mode == ROW:
        found = tl.load(scale + row[:, None] + column[None, :] * 0)
    else:
        span = (half * 8 + column) * spans // 16
        found = tl.load(scale + (block * padded + row)[:, None] * spans + span[None, :])
    return found


@triton.jit
def _dot(weight, x, total):
    if INTERPRETED:
        total = tl.dot(weight.to(tl.float32), x.to(tl.float32), total)
    else:
        total = tl.dot(weight, x, total)
    return total


@triton.jit
def _sparse_block(
    total, at, plane, scale, codebook, x_at, even_bits, odd_bits,
    dtype: tl.constexpr, has_codebook: tl.constexpr, scaled: tl.constexpr,
):  # fmt: skip
    """Add the product with 256 inputs of a 2:4 weight; `scale` `[rows, 8]` is per word, 32 inputs."""
    first = tl.load(at)
    second = tl.load(at + plane)
    places = tl.load(at + 2 * plane)
    if has_codebook:
        for group in tl.static_range(8):
            one = _looked_up(codebook, first, 4 * group)
            two = _looked_up(codebook, second, 4 * group)
            if scaled:
                one = one * scale.to(tl.float32)
                two = two * scale.to(tl.float32)
            one = one.to(dtype)
            two = two.to(dtype)
            none = tl.full(one.shape, 0.0, dtype)
            at0 = (places >> (4 * group)) & 1
            at1 = (places >> (4 * group)) & 2
            at2 = (places >> (4 * group)) & 4
            at3 = (places >> (4 * group)) & 8
            value0 = tl.where(at0 != 0, one, none)
            value1 = tl.where(at1 != 0, tl.where(at0 != 0, two, one), none)
            value2 = tl.where(at2 != 0, tl.where(at3 != 0, one, two), none)
            value3 = tl.where(at3 != 0, two, none)
            total = _dot(_side_by_side(value0, value1), tl.load(x_at + 4 * group), total)
            total = _dot(_side_by_side(value2, value3), tl.load(x_at + 4 * group + 2), total)
    else:
        place0, place1, place2, place3 = _spread(first, second, places)
        if scaled:
            scale = _side_by_side(scale, scale)
        for quarter in tl.static_range(4):
            # Places 0 and 1, then 2 and 3, of groups 0 to 3, then of groups 4 to 7.
            if quarter == 0:
                words = (place0 & 0xFFFF) | (place1 << 16)
            elif quarter == 1:
                words = (place2 & 0xFFFF) | (place3 << 16)
            elif quarter == 2:
                words = ((place0 >> 16) & 0xFFFF) | (place1 & -65536)
            else:
                words = ((place2 >> 16) & 0xFFFF) | (place3 & -65536)
            for number in tl.static_range(4):
                weight = _floats(words, number, even_bits, odd_bits, dtype)
                if scaled:
                    weight = _scaled(weight, scale, dtype)
                found = tl.load(x_at + 16 * (quarter // 2) + 2 * (quarter % 2) + 4 * number)
                total = _dot(weight, found, total)
    return total


@triton.jit
def _dense_weight(words, codebook, number: tl.constexpr, even_bits, odd_bits, dtype: tl.constexpr, has_codebook: tl.constexpr):
    """Inputs 2 x number and the next of every word's eight, `[rows, 16]`; values of a codebook in float32, codes in `dtype`."""
    if has_codebook:
        low = _looked_up(codebook, words, 4 * number)
        high = _looked_up(codebook, words, 4 * number + 16)
        weight = _side_by_side(low, high)
    else:
        weight = _floats(words, number, even_bits, odd_bits, dtype)
    return weight


@triton.jit
def _dense_block(
    total, at, scale, zero, codebook, x_at, even_bits, odd_bits,
    dtype: tl.constexpr, has_codebook: tl.constexpr, scaled: tl.constexpr, has_zero: tl.constexpr,
):  # fmt: skip
    """Add the product with 64 inputs of a dense weight; `scale` and `zero` `[rows, 8]` are per word, 8 inputs."""
    words = tl.load(at)
    if scaled:
        scale = _side_by_side(scale, scale)
    if has_zero:
        zero = _side_by_side(zero, zero)
    for number in tl.static_range(4):
        weight = _dense_weight(words, codebook, number, even_bits, odd_bits, dtype, has_codebook)
        if has_zero:
            weight = _less_zeros(weight, zero, dtype)
        if scaled and has_codebook:
            weight = weight * scale.to(tl.float32)
        elif scaled:
            weight = _scaled(weight, scale, dtype)
        total = _dot(weight.to(dtype), tl.load(x_at + 2 * number), total)
    return total


@triton.jit
def _tail_block(
    total, at, scale_at, codebook, t_at, even_bits, odd_bits, dtype: tl.constexpr, has_codebook: tl.constexpr
):  # fmt: skip
    """Add the product with 64 ranks of the adapter's second factor; `scale_at` `[rows, 16]`: a scale per row and rank."""
    words = tl.load(at)
    for number in tl.static_range(4):
        weight = _dense_weight(words, codebook, number, even_bits, odd_bits, dtype, has_codebook)
        scale = tl.load(scale_at + 2 * number)
        if has_codebook:
            weight = weight * scale.to(tl.float32)
        else:
            weight = _scaled(weight, scale, dtype)
        total = _dot(weight.to(dtype), tl.load(t_at + 2 * number), total)
    return total


@triton.jit(do_not_specialize=["batch", "blocks", "share", "splits", "tail_blocks"])
def product_kernel(
    x, words, scale, zero, codebook, bias, y, partial, counters, bits, t, tail, tail_scale, tail_codebook, members,
    batch, rows, blocks, padded, x_stride, t_stride, share, splits, tail_blocks, tail_width, tail_group,
    sparse: tl.constexpr, has_codebook: tl.constexpr, has_zero: tl.constexpr, scale_mode: tl.constexpr, spans: tl.constexpr,
    has_bias: tl.constexpr, tail_kind: tl.constexpr, tail_has_codebook: tl.constexpr, split: tl.constexpr,
    stacked: tl.constexpr, tile: tl.constexpr, tokens: tl.constexpr,
):  # fmt: skip
    """y `[batch, rows]`: a program makes `tile` rows for `tokens` tokens from its `share` of the blocks of inputs.

    x has whole blocks of inputs: loads under a mask at its end would not be copied ahead.
    padded: rows from one plane of words to the next, which are more than this layer's where it lies among others.
    Where layers are stacked into one weight, `members` says what differs among them for every 64 rows (stacking.Stack).

    Where the blocks are split, partial sums meet in memory; the program that comes last adds them in their order, so that
    the result is the same every time, and leaves its counter at zero for the next launch.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    scaled: tl.constexpr = scale_mode == SPANS
    block_inputs: tl.constexpr = 256 if sparse else 128
    word_inputs: tl.constexpr = 32 if sparse else 8
    part = tl.program_id(1)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, 8)
    token = tl.program_id(2) * tokens + tl.arange(0, tokens)
    # Tokens beyond the batch read the first one; what they give is not stored.
    source = tl.where(token < batch, token, 0)
    pair = tl.arange(0, 16)
    even_bits = tl.load(bits + tl.full([1, 1], 0, tl.int32))
    odd_bits = tl.load(bits + 1 + tl.full([1, 1], 0, tl.int32))
    begin = part * share
    end = tl.minimum(begin + share, blocks)
    tail_row = row
    if stacked:
        member = members + (tl.program_id(0) * (tile // 64)) * 8
        codebook += tl.load(member)
        t += tl.load(member + 1)
        tail_blocks = tl.load(member + 2)
        tail_row = row - tl.load(member + 3)
        tail_scale += tl.load(member + 4) * tail_width
        tail_codebook += tl.load(member + 5)
        tail_group = tl.load(member + 6)

    place = row[:, None] * 8 + column[None, :]
    plane = padded * 8
    inputs = begin * block_inputs + (pair // 2) * word_inputs + pair % 2
    x_at = x + source[None, :] * x_stride + inputs[:, None]
    if sparse:
        at = words + begin * 3 * plane + place
    else:
        at = words + begin * 2 * plane + place
    total = tl.full([tile, tokens], 0.0, tl.float32)
    for block in range(begin, end):
        if scale_mode == BLOCK:
            before = total
            total = tl.full([tile, tokens], 0.0, tl.float32)
        if sparse:
            if scaled:
                own = tl.load(scale + (block * padded + row)[:, None] * spans + (column * spans // 8)[None, :])
            else:
                own = 0.0
            total = _sparse_block(
                total, at, plane, own, codebook, x_at, even_bits, odd_bits, dtype, has_codebook, scaled
            )  # fmt: skip
            at += 3 * plane
        else:
            for half in tl.static_range(2):
                if scaled:
                    own = _of_words(scale, block, half, row, column, padded, scale_mode, spans)
                else:
                    own = 0.0
                if has_zero:
                    middle = _of_words(zero, block, half, row, column, padded, scale_mode, spans)
                else:
                    middle = 0.0
                total = _dense_block(
                    total, at + half * plane, own, middle, codebook, x_at + half * 64, even_bits, odd_bits,
                    dtype, has_codebook, scaled, has_zero,
                )  # fmt: skip
            at += 2 * plane
        if scale_mode == BLOCK:
            total = before + total * tl.load(scale + block * padded + row)[:, None].to(tl.float32)
        x_at += block_inputs
    if scale_mode == TENSOR:
        total *= tl.load(scale).to(tl.float32)
    elif scale_mode == ROW:
        total *= tl.load(scale + row)[:, None].to(tl.float32)

    if tail_kind == PACKED_TAIL:
        ranks = (pair // 2) * 8 + pair % 2
        group = tail_row // tail_group
        for block in range(part, tail_blocks, splits):
            total = _tail_block(
                total, tail + block * plane + place,
                tail_scale + group[:, None] * tail_width + (block * 64 + ranks)[None, :], tail_codebook,
                t + source[None, :] * t_stride + (block * 64 + ranks)[:, None], even_bits, odd_bits, dtype, tail_has_codebook,
            )  # fmt: skip
    elif tail_kind == DENSE_TAIL:
        rank = tl.arange(0, 64)
        for block in range(part, tail_blocks, splits):
            left = tl.load(tail + row[:, None] * tail_width + (block * 64 + rank)[None, :])
            middle = tl.load(t + source[None, :] * t_stride + (block * 64 + rank)[:, None])
            total = _dot(left.to(dtype), middle, total)

    y_at = y + token[None, :] * rows + row[:, None]
    inside = (row < rows)[:, None] & (token < batch)[None, :]
    if split:
        cell = tl.arange(0, tokens)[None, :] * tile + tl.arange(0, tile)[:, None]
        number = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        here = partial + number * (splits * tile * tokens) + cell
        tl.store(here + part * (tile * tokens), total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + number, 1, sem="acq_rel", scope="gpu")
        if arrived == splits - 1:
            together = tl.full([tile, tokens], 0.0, tl.float32)
            for other in range(splits):
                together += tl.load(here + other * (tile * tokens), cache_modifier=".cg")
            if has_bias:
                together += tl.load(bias + row, mask=row < rows, other=0.0)[:, None].to(tl.float32)
            tl.store(y_at, together.to(dtype), mask=inside)
            tl.store(counters + number, 0)
    else:
        if has_bias:
            total += tl.load(bias + row, mask=row < rows, other=0.0)[:, None].to(tl.float32)
        tl.store(y_at, total.to(dtype), mask=inside)


@triton.jit
def _named(words, codebook, shift: tl.constexpr, has_codebook: tl.constexpr):
    """What the nibbles of words at a bit are: values of a codebook, float32, or codes as they are stored."""
    if has_codebook:
        found = _looked_up(codebook, words, shift)
    else:
        found = (words >> shift) & 15
    return found


@triton.jit
def _eight(words, codebook, high: tl.constexpr, middle: tl.constexpr, low: tl.constexpr, has_codebook: tl.constexpr):
    """All nibbles of words `[rows, n]`, `[rows, 8 n]`: number 4 h + 2 m + l of a word lies at bit h high + m middle + l low."""
    # Values are looked up before they are joined: afterwards the nibbles would cross threads for it.
    at0 = tl.join(_named(words, codebook, 0, has_codebook), _named(words, codebook, high, has_codebook))
    at1 = tl.join(_named(words, codebook, low, has_codebook), _named(words, codebook, high + low, has_codebook))
    at2 = tl.join(_named(words, codebook, middle, has_codebook), _named(words, codebook, high + middle, has_codebook))
    at3 = tl.join(
        _named(words, codebook, middle + low, has_codebook), _named(words, codebook, high + middle + low, has_codebook)
    )
    return tl.reshape(tl.join(tl.join(at0, at2), tl.join(at1, at3)), [words.shape[0], 8 * words.shape[1]])


@triton.jit
def _values(words, codebook, high: tl.constexpr, middle: tl.constexpr, low: tl.constexpr, has_codebook: tl.constexpr):
    """What all nibbles of words stand for, float32, in the order of `_eight`."""
    found = _eight(words, codebook, high, middle, low, has_codebook)
    if not has_codebook:
        found = ((found ^ 8) - 8).to(tl.float32)
    return found


@triton.jit
def _repeated(tile, times: tl.constexpr):
    """Every column of a tile `[rows, n]` `times` over, `[rows, times n]`."""
    wide = tl.broadcast_to(tile[:, :, None], [tile.shape[0], tile.shape[1], times])
    return tl.reshape(wide, [tile.shape[0], times * tile.shape[1]])


@triton.jit(do_not_specialize=["rows"])
def unpack_kernel(
    words, scale, zero, codebook, out, rows, padded, out_stride, scale_stride, scale_group,
    sparse: tl.constexpr, has_codebook: tl.constexpr, has_zero: tl.constexpr, scale_mode: tl.constexpr, spans: tl.constexpr,
    tail: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The matrix that a packed weight stands for, in the dtype of `out`; 256 (2:4) or 64 inputs of `tile` rows a program.

    `out` has room for whole blocks of inputs in every row, and what fills them up is written, too. A tail (an adapter's second
    factor) has scales `[groups of scale_group rows, scale_stride ranks]`. A thread's values are joined before they are stored:
    one by one they would go to memory two bytes at a time.
    """
    dtype: tl.constexpr = out.dtype.element_ty
    inputs: tl.constexpr = 256 if sparse else 64
    block = tl.program_id(1)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.arange(0, 8)
    k = block * inputs + tl.arange(0, inputs)
    plane = padded * 8
    place = row[:, None] * 8 + column[None, :]
    factor = tl.full([tile, 8], 1.0, tl.float32)
    if tail:
        factor = factor
    elif scale_mode == TENSOR:
        factor *= tl.load(scale).to(tl.float32)
    elif scale_mode == ROW:
        factor *= tl.load(scale + row)[:, None].to(tl.float32)
    elif sparse:
        factor = tl.load(scale + (block * padded + row)[:, None] * spans + (column * spans // 8)[None, :]).to(tl.float32)
    else:
        span = ((block % 2) * 8 + column) * spans // 16
        factor = tl.load(scale + ((block // 2) * padded + row)[:, None] * spans + span[None, :]).to(tl.float32)
    if sparse:
        at = words + block * 3 * plane + place
        factor = _repeated(factor, 8)
        one = (_values(tl.load(at), codebook, 16, 8, 4, has_codebook) * factor).to(dtype)
        two = (_values(tl.load(at + plane), codebook, 16, 8, 4, has_codebook) * factor).to(dtype)
        kept = _eight(tl.load(at + 2 * plane), codebook, 16, 8, 4, False)
        none = tl.full(one.shape, 0.0, dtype)
        at0, at1, at2, at3 = (kept & 1) != 0, (kept & 2) != 0, (kept & 4) != 0, (kept & 8) != 0
        value0 = tl.where(at0, one, none)
        value1 = tl.where(at1, tl.where(at0, two, one), none)
        value2 = tl.where(at2, tl.where(at3, one, two), none)
        value3 = tl.where(at3, two, none)
        values = tl.reshape(tl.join(tl.join(value0, value2), tl.join(value1, value3)), [tile, inputs])
    else:
        # Input 2 j + h of a word's eight lies at bits 16 h + 4 j.
        values = _values(tl.load(words + block * plane + place), codebook, 8, 4, 16, has_codebook)
        if tail:
            values *= tl.load(scale + (row // scale_group)[:, None] * scale_stride + k[None, :]).to(tl.float32)
        else:
            if has_zero:
                middle = _of_words(zero, block // 2, block % 2, row, column, padded, scale_mode, spans)
                values -= _repeated(middle.to(tl.float32), 8)
            values *= _repeated(factor, 8)
        values = values.to(dtype)
    tl.store(out + row[:, None].to(tl.int64) * out_stride + k[None, :], values, mask=(row < rows)[:, None])
