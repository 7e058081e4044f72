// A piece of the column sweep: a few inputs are pruned and rounded one after another, and the later ones of the piece are updated
// for the errors. The law is slimlm/core/solvers/sweep.py.

#ifndef SLIMLM_SWEEP_H
#define SLIMLM_SWEEP_H

#include "blocks.h"

namespace slimlm {
namespace {

// stays [of][kBlock], 1 or 0: the `kept` of `of` rows with the largest weight^2 x variance; of equal ones the earlier.
void choose_largest(const float* rows, const float* variance, int of, int kept, float* stays) {
    for (int v = 0; v < kVectors; ++v) {
        Floats score[kMostOfUnit], larger_ones[kMostOfUnit];
        for (int i = 0; i < of; ++i) {
            const Floats weight = load(rows + i * kBlock + v * kLanes);
            score[i] = weight * weight * all(variance[i]);
            larger_ones[i] = Floats{};
        }
        for (int i = 0; i < of; ++i)
            for (int j = i + 1; j < of; ++j) {
                const Mask first = score[i] >= score[j];
                larger_ones[i] += where(first, Floats{}, all(1));
                larger_ones[j] += where(first, all(1), Floats{});
            }
        for (int i = 0; i < of; ++i)
            store(stays + i * kBlock + v * kLanes, where(larger_ones[i] < all(float(kept)), all(1), Floats{}));
    }
}

// The state of a piece in one block of outputs.
template <class Grid>
struct SweptBlock {
    const SlimlmSweep& s;
    const Grid& grid;
    const int64_t low, rows, first, width;
    alignas(64) float weight[kMostInputs * kBlock], error[kMostInputs * kBlock];
    alignas(64) float stays[kMostOfUnit * kBlock], index[kBlock], value[kBlock];
    float variance[kMostInputs];
    BlockScales scales;

    SweptBlock(const SlimlmSweep& sweep, const Grid& rounding, int64_t from, int64_t to, int64_t output)
        : s(sweep), grid(rounding), low(from), rows(to - from), first(output), width(std::min<int64_t>(kBlock, sweep.out - output)) {}

    float upper(int64_t i, int64_t j) const { return s.upper[(low + i) * s.in + low + j]; }

    void run() {
        take_rows(s.remaining + low * s.out + first, rows, s.out, width, weight);
        for (int64_t i = 0; i < rows; ++i) variance[i] = 1 / (upper(i, i) * upper(i, i));
        if (s.rounding.scale) scales.read(s.rounding, low, first, width);
        const int64_t together = s.of ? s.of * std::max(1, kTall / s.of) : kTall;
        for (int64_t begin = 0; begin < rows; begin += together) {
            const int64_t end = std::min(rows, begin + together);
            subtract(weight + begin * kBlock, end - begin, s.upper + low * s.in + low + begin, s.in, error, begin);
            for (int64_t i = begin; i < end; ++i) decide(i, end);
        }
        put_rows(weight, rows, s.out, width, s.remaining + low * s.out + first);
        put_rows(error, rows, s.out, width, s.error + low * s.out + first);
    }

    // Decides input i, and updates those after it up to `end`.
    void decide(int64_t i, int64_t end) {
        const int64_t at = (low + i) * s.out + first;
        float* stay = stays;
        if (s.of) {
            if (i % s.of == 0) choose_largest(weight + i * kBlock, variance + i, s.of, s.kept, stays);
            stay += i % s.of * kBlock;
            put_bytes(stay, width, s.mask + at);
        } else if (s.mask) {
            take_bytes(s.mask + at, width, stay);
        }
        if (s.rounding.per_input) scales.read(s.rounding, low + i, first, width);
        const Floats pivot = all(upper(i, i));
        for (int v = 0; v < kVectors; ++v) {
            const Floats now = load(weight + i * kBlock + v * kLanes);
            const Rounded rounded = grid.round(now, scales, v);
            const Floats own = s.mask ? rounded.value * load(stay + v * kLanes) : rounded.value;
            const Floats its = (now - own) / pivot;
            store(index + v * kLanes, rounded.index);
            store(value + v * kLanes, own);
            store(error + i * kBlock + v * kLanes, its);
            for (int64_t later = i + 1; later < end; ++later) {
                float* row = weight + later * kBlock + v * kLanes;
                store(row, subtract_product(load(row), all(upper(i, later)), its));
            }
        }
        std::memcpy(s.value + at, value, sizeof(float) * size_t(width));
        if (s.index) put_bytes(index, width, s.index + at);
    }
};

void sweep(const SlimlmSweep& s, int64_t low, int64_t high, int64_t first, int64_t last) {
    with_grid(s.rounding, [&](const auto& grid) {
        for (int64_t output = first; output < last; output += kBlock)
            SweptBlock<std::decay_t<decltype(grid)>>(s, grid, low, high, output).run();
    });
}

// The mask of units of `of` inputs from low up to high, as the weights are now.
void choose(const SlimlmSweep& s, int64_t low, int64_t high, int64_t first, int64_t last) {
    alignas(64) float weight[kMostOfUnit * kBlock], stays[kMostOfUnit * kBlock];
    float variance[kMostOfUnit];
    for (int64_t unit = low; unit < high; unit += s.of) {
        for (int i = 0; i < s.of; ++i) {
            const float pivot = s.upper[(unit + i) * (s.in + 1)];
            variance[i] = 1 / (pivot * pivot);
        }
        for (int64_t output = first; output < last; output += kBlock) {
            const int64_t width = std::min<int64_t>(kBlock, s.out - output);
            take_rows(s.remaining + unit * s.out + output, s.of, s.out, width, weight);
            choose_largest(weight, variance, s.of, s.kept, stays);
            for (int i = 0; i < s.of; ++i) put_bytes(stays + i * kBlock, width, s.mask + (unit + i) * s.out + output);
        }
    }
}

}  // namespace
}  // namespace slimlm

#endif
