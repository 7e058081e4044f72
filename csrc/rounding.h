// Rounding numbers to codes of the even grid, and counting them in bins.

#ifndef SLIMLM_ROUNDING_H
#define SLIMLM_ROUNDING_H

#include <algorithm>

#include "vectors.h"

namespace slimlm {
namespace {

// Numbers whose codes are floats in between, so that the compiler narrows many at once.
constexpr int64_t kRounded = 256;

void encode(const float* numbers, int64_t count, float scale, float smallest, float largest, int8_t* codes) {
    const Floats low = all(smallest), high = all(largest), magic = all(kToWhole);
    for (int64_t begin = 0; begin < count; begin += kRounded) {
        const int64_t end = std::min(count, begin + kRounded);
        float rounded[kRounded];
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const Floats ratio = load(numbers + i) / scale;
            store(rounded + (i - begin), (smaller(larger(ratio, low), high) + magic) - magic);
        }
        for (; i < end; ++i) {
            const float ratio = numbers[i] / scale;
            const float inside = ratio < smallest ? smallest : ratio > largest ? largest : ratio;
            rounded[i - begin] = (inside + kToWhole) - kToWhole;
        }
        for (i = begin; i < end; ++i) codes[i] = int8_t(int32_t(rounded[i - begin]));
    }
}

// Adds the weights (NULL: ones) of numbers to their bins, of `width` each from `low` on; what lies beyond joins the outermost.
void bin(const float* numbers, const float* weights, int64_t count, float low, float width, int32_t bins, double* totals) {
    const Floats first = {}, last = all(float(bins - 1));
    for (int64_t begin = 0; begin < count; begin += kRounded) {
        const int64_t end = std::min(count, begin + kRounded);
        int32_t place[kRounded];
        float at[kRounded];
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes)
            store(at + (i - begin), smaller(larger((load(numbers + i) - low) / width, first), last));
        for (; i < end; ++i) {
            const float place = (numbers[i] - low) / width;
            at[i - begin] = place > 0 ? std::min(place, float(bins - 1)) : 0.f;  // NaN joins the first, as in the vectors
        }
        for (i = 0; i < end - begin; ++i) place[i] = int32_t(at[i]);
        if (weights)
            for (i = begin; i < end; ++i) totals[place[i - begin]] += double(weights[i]);
        else
            for (i = begin; i < end; ++i) totals[place[i - begin]] += 1;
    }
}

}  // namespace
}  // namespace slimlm

#endif
