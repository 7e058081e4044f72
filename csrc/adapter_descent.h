// A piece of coordinate descent on the right factor of an adapter. The law is slimlm/core/solvers/adapter_descent.py.

#ifndef SLIMLM_ADAPTER_DESCENT_H
#define SLIMLM_ADAPTER_DESCENT_H

#include <algorithm>
#include <vector>

#include "loops.h"
#include "vectors.h"

namespace slimlm {
namespace {

// into [size] += factor x from
SLIMLM_LOCAL void add_multiple(float* into, float factor, const float* from, int64_t size) {
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) store(into + k, multiply_add(all(factor), load(from + k), load(into + k)));
    for (; k < size; ++k) into[k] += factor * from[k];
}

// into [size] = a symmetric matrix x vector
SLIMLM_LOCAL void symmetric_product(const float* matrix, const float* vector, int64_t size, float* into) {
    std::fill(into, into + size, 0.f);
    for (int64_t j = 0; j < size; ++j)
        if (vector[j] != 0) add_multiple(into, vector[j], matrix + j * size, size);
}

void descend_right(const SlimlmRightDescent& d, int64_t low, int64_t high) {
    const int64_t rank = d.rank;
    const float smallest = -float(1 << (d.bits - 1)), largest = -smallest - 1;
    std::vector<float> room(size_t(3 * rank));
    float *step = room.data(), *change = step + rank, *code = change + rank;
    for (int64_t i = low; i < high; ++i) {
        const float curvature = d.covariance[i * (d.in + 1)];
        float *slope = d.gradient + i * rank, *along = d.along + (i - low) * rank;
        std::fill(along, along + rank, 0.f);
        if (!(curvature > 0)) continue;
        const float *value = d.value + i * rank, *scale = d.scale + i * rank;
        symmetric_product(d.inverse, slope, rank, step);
        bool moved = false;
        for (int64_t k = 0; k < rank; ++k) {
            const float ratio = scale[k] == 0 ? 0.f : (value[k] + step[k] / curvature) / scale[k];
            const float inside = ratio < smallest ? smallest : ratio > largest ? largest : ratio;
            code[k] = (inside + kToWhole) - kToWhole;
            change[k] = code[k] * scale[k] - value[k];
            moved |= change[k] != 0;
        }
        if (!moved) continue;
        symmetric_product(d.inner, change, rank, along);
        double gain = 0;
        for (int64_t k = 0; k < rank; ++k) gain += double(change[k]) * (2 * double(slope[k]) - double(curvature) * along[k]);
        if (!(gain > 0)) {
            std::fill(along, along + rank, 0.f);
            continue;
        }
        for (int64_t k = 0; k < rank; ++k)
            if (change[k] != 0) d.index[i * rank + k] = uint8_t(int(code[k] - smallest));
        for (int64_t later = i + 1; later < high; ++later)
            add_multiple(d.gradient + later * rank, -d.covariance[later * d.in + i], along, rank);
    }
}

}  // namespace
}  // namespace slimlm

#endif
