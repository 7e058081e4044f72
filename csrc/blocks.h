// Blocks of outputs, which the column sweep and coordinate descent decide independently of one another, and the rounding of an
// input's weights in one. Matrices are [inputs, outputs]; a block's rows are copied to [inputs][kBlock], zeros where a block at
// the end has fewer outputs, so that all arithmetic is on whole vectors.

#ifndef SLIMLM_BLOCKS_H
#define SLIMLM_BLOCKS_H

#include <algorithm>
#include <cmath>
#include <cstring>

#include "loops.h"
#include "vectors.h"

namespace slimlm {
namespace {

constexpr int kVectors = 2;
constexpr int kBlock = kVectors * kLanes;
static_assert(kBlock <= kOutputsOfJob && kOutputsOfJob % kBlock == 0, "a job has whole blocks");
// Inputs whose sums are in registers together.
constexpr int kTall = kLanes == 16 ? 8 : 4;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// The rows of a block and back.
SLIMLM_LOCAL void take_rows(const float* from, int64_t rows, int64_t step, int64_t width, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += step, to += kBlock) {
        std::memcpy(to, from, sizeof(float) * size_t(width));
        std::fill(to + width, to + kBlock, 0.f);
    }
}
SLIMLM_LOCAL void put_rows(const float* from, int64_t rows, int64_t step, int64_t width, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += kBlock, to += step) std::memcpy(to, from, sizeof(float) * size_t(width));
}
SLIMLM_LOCAL void take_bytes(const uint8_t* from, int64_t width, float* to) {
    for (int64_t i = 0; i < width; ++i) to[i] = float(from[i]);
    std::fill(to + width, to + kBlock, 0.f);
}
SLIMLM_LOCAL void put_bytes(const float* from, int64_t width, uint8_t* to) {
    uint8_t bytes[kBlock];
    for (int v = 0; v < kVectors; ++v) {
        const Bytes some = __builtin_convertvector(__builtin_convertvector(load(from + v * kLanes), Mask), Bytes);
        std::memcpy(bytes + v * kLanes, &some, sizeof some);
    }
    std::memcpy(to, bytes, size_t(width));
}

// rows [kRows][kBlock] -= sum over i < count of matrix[i][row] x others[i]
template <int kRows>
SLIMLM_LOCAL void subtract_tile(float* rows, const float* matrix, int64_t step, const float* others, int64_t count) {
    Floats sum[kRows][kVectors] = {};
    for (int64_t i = 0; i < count; ++i, matrix += step, others += kBlock) {
        Floats other[kVectors];
        for (int v = 0; v < kVectors; ++v) other[v] = load(others + v * kLanes);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(all(matrix[r]), other[v], sum[r][v]);
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) {
            float* at = rows + r * kBlock + v * kLanes;
            store(at, load(at) - sum[r][v]);
        }
}

SLIMLM_LOCAL void subtract(float* rows, int64_t height, const float* matrix, int64_t step, const float* others, int64_t count) {
    if (count == 0) return;
    int64_t r = 0;
    for (; r + kTall <= height; r += kTall) subtract_tile<kTall>(rows + r * kBlock, matrix + r, step, others, count);
    for (; r < height; ++r) subtract_tile<1>(rows + r * kBlock, matrix + r, step, others, count);
}

// How one input's weights are rounded

struct Rounded {
    Floats index, value;
};

// The scales of one block, and zeros.
struct BlockScales {
    alignas(64) float scale[kBlock], inverse[kBlock], low[kBlock];

    void read(const SlimlmRounding& rounding, int64_t input, int64_t first, int64_t width) {
        const float* scales = rounding.scale + input * rounding.per_input + first * rounding.per_output;
        for (int i = 0; i < kBlock; ++i) {
            scale[i] = i < width ? scales[i * rounding.per_output] : 0.f;
            inverse[i] = scale[i] == 0 ? 0.f : 1 / scale[i];
        }
        const float middle = float((1 << rounding.bits) / 2);
        const float* zeros = rounding.zero ? rounding.zero + input * rounding.per_input + first * rounding.per_output : nullptr;
        for (int i = 0; i < kBlock; ++i) low[i] = zeros && i < width ? -zeros[i * rounding.per_output] : -middle;
    }
};

struct NoGrid {
    explicit NoGrid(const SlimlmRounding&) {}
    SLIMLM_LOCAL Rounded round(Floats weight, const BlockScales&, int) const { return {Floats{}, weight}; }
};

// Indices from 0 to 2^bits - 1, of which one, the zero, stands for zero.
struct WholeNumbers {
    Floats top;
    explicit WholeNumbers(const SlimlmRounding& rounding) : top(all(float((1 << rounding.bits) - 1))) {}
    SLIMLM_LOCAL Rounded round(Floats weight, const BlockScales& scales, int v) const {
        const Floats low = load(scales.low + v * kLanes), magic = all(kToWhole);
        const Floats ratio = weight * load(scales.inverse + v * kLanes);
        const Floats code = (smaller(larger(ratio, low), low + top) + magic) - magic;
        return {code - low, code * load(scales.scale + v * kLanes)};
    }
};

// At most sixteen values in ascending order.
struct CodebookValues {
    alignas(64) float value[16], border[16];  // the border above each value; none above the last
    int count;

    explicit CodebookValues(const SlimlmRounding& rounding) : count(1 << rounding.bits) {
        for (int i = 0; i < 16; ++i) value[i] = rounding.codebook[std::min(i, count - 1)];
        for (int i = 0; i < 16; ++i) border[i] = i + 1 < count ? (value[i + 1] + value[i]) / 2 : HUGE_VALF;
    }
    SLIMLM_LOCAL Rounded round(Floats weight, const BlockScales& scales, int v) const {
        const Floats scale = load(scales.scale + v * kLanes), ratio = weight * load(scales.inverse + v * kLanes);
#if defined(__AVX512F__)
        const __m512 borders = _mm512_load_ps(border);
        __m512i at = _mm512_setzero_si512();
        for (int step = 8; step > 0; step /= 2) {
            const __m512 next = _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(step - 1)), borders);
            at = _mm512_mask_add_epi32(at, _mm512_cmp_ps_mask(ratio, next, _CMP_GT_OQ), at, _mm512_set1_epi32(step));
        }
        return {_mm512_cvtepi32_ps(at), _mm512_permutexvar_ps(at, _mm512_load_ps(value)) * scale};
#else
        Floats index = {}, nearest = all(value[0]);
        for (int i = 0; i + 1 < count; ++i) {
            const Mask above = ratio > all(border[i]);
            index = index + where(above, all(1), Floats{});
            nearest = where(above, all(value[i + 1]), nearest);
        }
        return {index, nearest * scale};
#endif
    }
};

// body(grid) for the grid of a rounding.
template <class F>
void with_grid(const SlimlmRounding& rounding, F body) {
    if (!rounding.scale)
        body(NoGrid(rounding));
    else if (rounding.codebook)
        body(CodebookValues(rounding));
    else
        body(WholeNumbers(rounding));
}

}  // namespace
}  // namespace slimlm

#endif
