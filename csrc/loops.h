// The loops of compression that are compiled once for each set of instructions (compression_*.cpp), in a table. compression.cpp
// checks the arguments and shares the work among threads; a loop does one thread's piece of it.

#ifndef SLIMLM_LOOPS_H
#define SLIMLM_LOOPS_H

#include <cstdint>

namespace slimlm {

struct Loops {
    // codes [count] of numbers [count] that share a scale other than zero.
    void (*encode)(const float* numbers, int64_t count, float scale, float smallest, float largest, int8_t* codes);
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
