// Vectors of floats of the width that a file is compiled for, for the loops that compression calls. GCC's and clang's vector
// types have the arithmetic operators; the few operations beyond them stand here. Everything is local to the file that
// includes it, so that no copy compiled for one processor is linked into what runs on another.

#ifndef SLIMLM_VECTORS_H
#define SLIMLM_VECTORS_H

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace slimlm {
namespace {

#define SLIMLM_LOCAL inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));

SLIMLM_LOCAL Floats load(const float* p) {
    Floats a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
SLIMLM_LOCAL void store(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
SLIMLM_LOCAL Floats all(float x) { return x - Floats{}; }

// Of two numbers of which one is NaN these give the second, as the processors' instructions do.
#if defined(__AVX512F__)
SLIMLM_LOCAL Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
SLIMLM_LOCAL Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
SLIMLM_LOCAL Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
SLIMLM_LOCAL Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#elif defined(__x86_64__)
SLIMLM_LOCAL Floats smaller(Floats a, Floats b) { return _mm_min_ps(a, b); }
SLIMLM_LOCAL Floats larger(Floats a, Floats b) { return _mm_max_ps(a, b); }
#else
SLIMLM_LOCAL Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
SLIMLM_LOCAL Floats larger(Floats a, Floats b) { return a > b ? a : b; }
#endif

// a b + c, rounded once where the processor can.
#if defined(__AVX512F__)
SLIMLM_LOCAL Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
SLIMLM_LOCAL Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__)
SLIMLM_LOCAL Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
#else
SLIMLM_LOCAL Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

// c - a b, likewise.
#if defined(__AVX512F__)
SLIMLM_LOCAL Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
#elif defined(__FMA__)
SLIMLM_LOCAL Floats subtract_product(Floats c, Floats a, Floats b) { return _mm256_fnmadd_ps(a, b, c); }
#elif defined(__aarch64__)
SLIMLM_LOCAL Floats subtract_product(Floats c, Floats a, Floats b) { return vfmsq_f32(c, a, b); }
#else
SLIMLM_LOCAL Floats subtract_product(Floats c, Floats a, Floats b) { return c - a * b; }
#endif

#if defined(__AVX512F__)
SLIMLM_LOCAL Floats root(Floats a) { return _mm512_sqrt_ps(a); }
#elif defined(__AVX2__)
SLIMLM_LOCAL Floats root(Floats a) { return _mm256_sqrt_ps(a); }
#elif defined(__x86_64__)
SLIMLM_LOCAL Floats root(Floats a) { return _mm_sqrt_ps(a); }
#elif defined(__aarch64__)
SLIMLM_LOCAL Floats root(Floats a) { return vsqrtq_f32(a); }
#else
SLIMLM_LOCAL Floats root(Floats a) {
    for (int lane = 0; lane < kLanes; ++lane) a[lane] = __builtin_sqrtf(a[lane]);
    return a;
}
#endif

// The results of comparisons: all bits of a lane or none.
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));

SLIMLM_LOCAL Floats where(Mask condition, Floats a, Floats b) { return condition ? a : b; }
SLIMLM_LOCAL Floats magnitude_of(Floats a) { return larger(a, -a); }
SLIMLM_LOCAL Floats power(Floats a, float exponent) {
    for (int lane = 0; lane < kLanes; ++lane) a[lane] = __builtin_powf(a[lane], exponent);
    return a;
}

// Added to a number of less than 2^22 and subtracted again, it leaves the nearest whole number, ties to even.
constexpr float kToWhole = 12582912.f;  // 1.5 x 2^23

}  // namespace
}  // namespace slimlm

#endif
