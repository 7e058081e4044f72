// Rounding numbers to codes of the even grid.

#ifndef SLIMLM_ROUNDING_H
#define SLIMLM_ROUNDING_H

#include "vectors.h"

namespace slimlm {
namespace {

void encode(const float* numbers, int64_t count, float scale, float smallest, float largest, int8_t* codes) {
    const Floats low = all(smallest), high = all(largest), magic = all(kToWhole);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats ratio = load(numbers + i) / scale;
        const Floats code = (smaller(larger(ratio, low), high) + magic) - magic;
        for (int lane = 0; lane < kLanes; ++lane) codes[i + lane] = int8_t(code[lane]);
    }
    for (; i < count; ++i) {
        const float ratio = numbers[i] / scale;
        const float inside = ratio < smallest ? smallest : ratio > largest ? largest : ratio;
        codes[i] = int8_t((inside + kToWhole) - kToWhole);
    }
}

}  // namespace
}  // namespace slimlm

#endif
