// The loops of compression that are compiled once for each set of instructions (compression_*.cpp), in a table. compression.cpp
// checks the arguments and shares the work among threads; a loop does one thread's piece of it.

#ifndef SLIMLM_LOOPS_H
#define SLIMLM_LOOPS_H

#include <cstdint>

#include "compression.h"

namespace slimlm {

// Larger sets are searched one by one, smaller ones several together.
constexpr int64_t kSmallSet = 512;
constexpr int64_t kMostInputs = SLIMLM_MOST_INPUTS;
constexpr int kMostOfUnit = SLIMLM_MOST_OF_UNIT;
// Outputs of one job of a sweep or descent: whole blocks of every variant.
constexpr int64_t kOutputsOfJob = 32;

struct Loops {
    // codes [count] of numbers [count] that share a scale other than zero.
    void (*encode)(const float* numbers, int64_t count, float scale, float smallest, float largest, int8_t* codes);
    // Scales of the sets from first up to last, see slimlm_best_scale and slimlm_nearby_scale.
    void (*best_scale)(const SlimlmSets& sets, const SlimlmGrid& grid, int coarse, bool either_sign, int64_t first, int64_t last,
                       float* scales);
    void (*nearby_scale)(const SlimlmSets& sets, const SlimlmGrid& grid, const float* start, int64_t first, int64_t last,
                         float* scales);
    void (*affine_scale)(const SlimlmSets& sets, int bits, int coarse, int64_t first, int64_t last, float* scales, float* zeros);
    // Of one set, or a piece of it, under one scale; see scale_search.h.
    void (*code_sums)(const float* points, const float* weights, int64_t count, float scale, float smallest, float largest,
                      double* sums);
    double (*code_error)(const float* points, const float* weights, int64_t count, float scale, float smallest, float largest);
    void (*bin)(const float* numbers, const float* weights, int64_t count, float low, float width, int32_t bins, double* totals);
    // Of the outputs from first up to last; see slimlm_sweep, slimlm_choose and slimlm_descend.
    void (*sweep)(const SlimlmSweep& sweep, int64_t low, int64_t high, int64_t first, int64_t last);
    void (*choose)(const SlimlmSweep& sweep, int64_t low, int64_t high, int64_t first, int64_t last);
    void (*descend)(const SlimlmDescent& descent, int64_t low, int64_t high, int64_t first, int64_t last);
    void (*descend_right)(const SlimlmRightDescent& descent, int64_t low, int64_t high);
};

#if defined(__x86_64__)
extern const Loops loops_avx512, loops_avx2;
#endif
// On ARM the baseline has the vectors of every variant.
extern const Loops loops_portable;

// Those of the variant in use.
const Loops& active_loops();

}  // namespace slimlm

#endif
