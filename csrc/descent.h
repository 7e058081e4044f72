// A piece of coordinate descent on codes: the codes of a few inputs are decided again one after another (or the mask and codes of
// an n:m group together), and the gradient of the later ones of the piece is updated. The law is slimlm/core/solvers/base_descent.py.

#ifndef SLIMLM_DESCENT_H
#define SLIMLM_DESCENT_H

#include "blocks.h"

namespace slimlm {
namespace {

// The state of a piece in one block of outputs.
template <class Grid>
struct DescentBlock {
    const SlimlmDescent& d;
    const Grid& grid;
    const int64_t low, rows, first, width;
    alignas(64) float gradient[kMostInputs * kBlock], value[kMostInputs * kBlock], change[kMostInputs * kBlock];
    alignas(64) float stay[kBlock], index[kBlock];
    BlockScales scales;

    DescentBlock(const SlimlmDescent& descent, const Grid& rounding, int64_t from, int64_t to, int64_t output)
        : d(descent), grid(rounding), low(from), rows(to - from), first(output), width(std::min<int64_t>(kBlock, d.out - output)) {}

    const float* covariance(int64_t i) const { return d.covariance + (low + i) * d.in + low; }

    void run() {
        const int64_t at = low * d.out + first;
        take_rows(d.gradient + at, rows, d.out, width, gradient);
        take_rows(d.value + at, rows, d.out, width, value);
        scales.read(d.rounding, low, first, width);
        const int64_t together = d.of ? d.of * std::max(1, kTall / d.of) : kTall;
        for (int64_t begin = 0; begin < rows; begin += together) {
            const int64_t end = std::min(rows, begin + together);
            subtract(gradient + begin * kBlock, end - begin, covariance(0) + begin, d.in, change, begin);
            for (int64_t i = begin; i < end; i += d.of ? d.of : 1) {
                if (d.of)
                    choose(i);
                else
                    recode(i);
                for (int64_t one = i; one < i + (d.of ? d.of : 1); ++one) update(one, i + (d.of ? d.of : 1), end);
            }
        }
        put_rows(gradient, rows, d.out, width, d.gradient + at);
        put_rows(value, rows, d.out, width, d.value + at);
        for (int64_t i = 0; i < rows; ++i) {
            float* into = d.change + at + i * d.out;
            for (int64_t o = 0; o < width; ++o) into[o] += change[i * kBlock + o];
        }
    }

    // Subtracts what the change of input i adds to the gradient of those from `begin` up to `end`.
    void update(int64_t i, int64_t begin, int64_t end) {
        const float* row = covariance(i);
        for (int v = 0; v < kVectors; ++v) {
            const Floats its = load(change + i * kBlock + v * kLanes);
            for (int64_t later = begin; later < end; ++later) {
                float* at = gradient + later * kBlock + v * kLanes;
                store(at, subtract_product(load(at), all(row[later]), its));
            }
        }
    }

    // New codes of one input under the same mask, where they lower the objective.
    void recode(int64_t i) {
        const int64_t at = (low + i) * d.out + first;
        const float curvature = covariance(i)[i];
        std::fill(change + i * kBlock, change + (i + 1) * kBlock, 0.f);
        if (!(curvature > 0)) return;
        if (d.mask) take_bytes(d.mask + at, width, stay);
        take_bytes(d.index + at, width, index);
        if (d.rounding.per_input) scales.read(d.rounding, low + i, first, width);
        for (int v = 0; v < kVectors; ++v) {
            float *old_at = value + i * kBlock + v * kLanes, *index_at = index + v * kLanes;
            const Floats old = load(old_at), slope = load(gradient + i * kBlock + v * kLanes);
            const Rounded rounded = grid.round(old + slope / all(curvature), scales, v);
            const Floats best = d.mask ? rounded.value * load(stay + v * kLanes) : rounded.value, step = best - old;
            const Mask better = step * (all(2) * slope - all(curvature) * step) > Floats{};
            const Floats taken = where(better, step, Floats{});
            store(index_at, where(better, rounded.index, load(index_at)));
            store(old_at, where(better, best, old));
            store(change + i * kBlock + v * kLanes, taken);
        }
        put_bytes(index, width, d.index + at);
    }

    // New mask and codes of the `of` inputs from i on, where they lower the objective; their own gradient is not updated.
    void choose(int64_t i) {
        alignas(64) float codes[kMostOfUnit * kBlock], stays[kMostOfUnit * kBlock];
        for (int one = 0; one < d.of; ++one) {
            const int64_t at = (low + i + one) * d.out + first;
            take_bytes(d.index + at, width, codes + one * kBlock);
            take_bytes(d.mask + at, width, stays + one * kBlock);
        }
        for (int v = 0; v < kVectors; ++v) choose(i, v, codes, stays);
        for (int one = 0; one < d.of; ++one) {
            const int64_t at = (low + i + one) * d.out + first;
            put_bytes(codes + one * kBlock, width, d.index + at);
            put_bytes(stays + one * kBlock, width, d.mask + at);
        }
    }

    void choose(int64_t i, int v, float* codes, float* stays) {
        const int of = d.of, kept = d.kept, square = kept * kept;
        const int64_t unit = (low + i) / of * d.masks;
        Floats old[kMostOfUnit], right_side[kMostOfUnit];
        for (int a = 0; a < of; ++a) old[a] = load(value + (i + a) * kBlock + v * kLanes);
        // The unit's best weights b solve H b = right_side; the cost of any is b H b - 2 b right_side.
        Floats present = {};
        for (int a = 0; a < of; ++a) {
            Floats product = {};
            for (int b = 0; b < of; ++b) product = multiply_add(all(covariance(i + a)[i + b]), old[b], product);
            right_side[a] = load(gradient + (i + a) * kBlock + v * kLanes) + product;
            present = multiply_add(old[a], product - all(2) * right_side[a], present);
        }
        Floats least = all(HUGE_VALF), best_mask = {}, best_value[kMostOfUnit] = {}, best_code[kMostOfUnit] = {};
        for (int m = 0; m < d.masks; ++m) {
            const int32_t* places = d.places + m * kept;
            const float *among = d.among + (unit + m) * square, *inverse = d.inverse + (unit + m) * square;
            const float* upper = d.upper + (unit + m) * square;
            Floats free[kMostOfUnit], found[kMostOfUnit], code[kMostOfUnit];
            for (int a = 0; a < kept; ++a) {
                free[a] = Floats{};
                for (int b = 0; b < kept; ++b) free[a] = multiply_add(all(inverse[a * kept + b]), right_side[places[b]], free[a]);
            }
            for (int a = 0; a < kept; ++a) {
                const Rounded rounded = grid.round(free[a], scales, v);
                found[a] = rounded.value;
                code[a] = rounded.index;
                const Floats error = (free[a] - found[a]) / all(upper[a * kept + a]);
                for (int b = a + 1; b < kept; ++b) free[b] = subtract_product(free[b], all(upper[a * kept + b]), error);
            }
            Floats cost = {};
            for (int a = 0; a < kept; ++a) {
                Floats along = all(-2) * right_side[places[a]];
                for (int b = 0; b < kept; ++b) along = multiply_add(all(among[a * kept + b]), found[b], along);
                cost = multiply_add(found[a], along, cost);
            }
            const Mask better = cost < least;
            least = where(better, cost, least);
            best_mask = where(better, all(float(m)), best_mask);
            for (int a = 0; a < kept; ++a) {
                best_value[a] = where(better, found[a], best_value[a]);
                best_code[a] = where(better, code[a], best_code[a]);
            }
        }
        // A margin for rounding, so that errors of float32 cannot make a pass raise the objective.
        const Mask taken = least < present - all(1e-6f) * magnitude_of(present);
        Floats chosen[kMostOfUnit] = {}, chosen_code[kMostOfUnit] = {}, chosen_stay[kMostOfUnit] = {};
        for (int m = 0; m < d.masks; ++m) {
            const Mask its = best_mask == all(float(m));
            for (int a = 0; a < kept; ++a) {
                const int32_t place = d.places[m * kept + a];
                chosen[place] = where(its, best_value[a], chosen[place]);
                chosen_code[place] = where(its, best_code[a], chosen_code[place]);
                chosen_stay[place] = where(its, all(1), chosen_stay[place]);
            }
        }
        for (int a = 0; a < of; ++a) {
            float *code = codes + a * kBlock + v * kLanes, *stay_at = stays + a * kBlock + v * kLanes;
            const Floats next = where(taken, chosen[a], old[a]);
            store(code, where(taken, chosen_code[a], load(code)));
            store(stay_at, where(taken, chosen_stay[a], load(stay_at)));
            store(value + (i + a) * kBlock + v * kLanes, next);
            store(change + (i + a) * kBlock + v * kLanes, next - old[a]);
        }
    }
};

void descend(const SlimlmDescent& d, int64_t low, int64_t high, int64_t first, int64_t last) {
    with_grid(d.rounding, [&](const auto& grid) {
        for (int64_t output = first; output < last; output += kBlock)
            DescentBlock<std::decay_t<decltype(grid)>>(d, grid, low, high, output).run();
    });
}

}  // namespace
}  // namespace slimlm

#endif
