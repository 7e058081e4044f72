// 512-bit vectors with AVX-512 (F, BW, VL, DQ) and VNNI. This file has run under emulation only (emulated_avx512.h): no
// processor with these instructions was at hand, and its speed is not known.

#if defined(SLIMLM_EMULATED)
#include "emulated_avx512.h"
#else
#include <immintrin.h>
#endif

#include "decoder.h"

namespace slimlm {
namespace {

struct Avx512 {
    static constexpr int kBytes = 64, kOffset = 128;
    using B = __m512i;
    using S = __m512i;  // as I: the dot product of four bytes adds to 32 bits at once
    using I = __m512i;
    using F = __m512;

    // Quads begin on multiples of 32 bytes only.
    static SLIMLM_INLINE B load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static SLIMLM_INLINE void store_bytes(uint8_t* p, B a) { _mm512_storeu_si512(p, a); }
    static SLIMLM_INLINE B splat(int x) { return _mm512_set1_epi8(char(x)); }
    static SLIMLM_INLINE B repeat(const int8_t* table) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    }
    static SLIMLM_INLINE B spread_four(const uint8_t* p) {
        int x;
        std::memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    static SLIMLM_INLINE B spread_eight(const uint8_t* p) {
        long long x;
        std::memcpy(&x, p, 8);
        return _mm512_set1_epi64(x);
    }
    static SLIMLM_INLINE B load_third(const uint8_t* p, int) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    }
    static SLIMLM_INLINE B second_four() { return _mm512_set1_epi32(0x04040000); }
    static SLIMLM_INLINE B bit_and(B a, B b) { return _mm512_and_si512(a, b); }
    static SLIMLM_INLINE B bit_or(B a, B b) { return _mm512_or_si512(a, b); }
    static SLIMLM_INLINE B shift_right(B a, int n) { return n ? _mm512_srli_epi16(a, unsigned(n)) : a; }
    static SLIMLM_INLINE B shift_left(B a, int n) { return n ? _mm512_slli_epi16(a, unsigned(n)) : a; }
    static SLIMLM_INLINE B add_bytes(B a, B b) { return _mm512_add_epi8(a, b); }
    static SLIMLM_INLINE B subtract_bytes(B a, B b) { return _mm512_sub_epi8(a, b); }
    static SLIMLM_INLINE B lookup(B table, B index) { return _mm512_shuffle_epi8(table, index); }

    static SLIMLM_INLINE I zero() { return _mm512_setzero_si512(); }
    static SLIMLM_INLINE S none() { return _mm512_setzero_si512(); }
    static SLIMLM_INLINE I dot(I sum, B activation, B weight) { return _mm512_dpbusd_epi32(sum, activation, weight); }
    static SLIMLM_INLINE S dot_small(S sum, B activation, B weight) { return _mm512_dpbusd_epi32(sum, activation, weight); }
    static SLIMLM_INLINE S dot_codes(S sum, B code, B activation) { return _mm512_dpbusd_epi32(sum, code, activation); }
    static SLIMLM_INLINE I widen(I sum, S small) { return _mm512_add_epi32(sum, small); }
    static SLIMLM_INLINE I add_rows(I sum, B weight) { return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), weight); }
    static SLIMLM_INLINE S add_weights(S sum, B weight) { return add_rows(sum, weight); }
    static SLIMLM_INLINE I take_128(I a, I b) { return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 7)); }
    static SLIMLM_INLINE I add_256(I upper, I lower) { return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower); }
    static SLIMLM_INLINE I add_16(I upper, I lower) { return _mm512_add_epi32(_mm512_slli_epi32(upper, 4), lower); }
    static SLIMLM_INLINE I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
    static SLIMLM_INLINE I splat_int(int32_t x) { return _mm512_set1_epi32(x); }
    static SLIMLM_INLINE I load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
    static SLIMLM_INLINE void store_ints(int32_t* p, I a) { _mm512_storeu_si512(p, a); }

    static SLIMLM_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static SLIMLM_INLINE F splat_float(float x) { return _mm512_set1_ps(x); }
    static SLIMLM_INLINE F load_float(const float* p) { return _mm512_loadu_ps(p); }
    static SLIMLM_INLINE F load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static SLIMLM_INLINE F load_bfloat(const uint16_t* p) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    static SLIMLM_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
    static SLIMLM_INLINE void store_half(uint16_t* p, F a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static SLIMLM_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
    static SLIMLM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static SLIMLM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static SLIMLM_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace

const Variant avx512 = variant_of<Avx512>("avx512");

}  // namespace slimlm
