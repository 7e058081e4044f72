// 256-bit vectors with AVX2, FMA and F16C.

#include <immintrin.h>

#include "decoder.h"

namespace slimlm {
namespace {

struct Avx2 {
    static constexpr int kBytes = 32, kOffset = 128;
    using B = __m256i;
    using S = __m256i;  // 16 sums of 16 bits, two for a row
    using I = __m256i;
    using F = __m256;

    static SLIMLM_INLINE B load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static SLIMLM_INLINE void store_bytes(uint8_t* p, B a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
    static SLIMLM_INLINE B splat(int x) { return _mm256_set1_epi8(char(x)); }
    static SLIMLM_INLINE B repeat(const int8_t* table) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    }
    static SLIMLM_INLINE B spread_four(const uint8_t* p) {
        int x;
        std::memcpy(&x, p, 4);
        return _mm256_set1_epi32(x);
    }
    static SLIMLM_INLINE B spread_eight(const uint8_t* p) {
        long long x;
        std::memcpy(&x, p, 8);
        return _mm256_set1_epi64x(x);
    }
    static SLIMLM_INLINE B load_third(const uint8_t* p, int half) {
        const B both = load(p);
        return half ? _mm256_srli_epi16(both, 4) : both;
    }
    static SLIMLM_INLINE B second_four() { return _mm256_set1_epi32(0x04040000); }
    static SLIMLM_INLINE B bit_and(B a, B b) { return _mm256_and_si256(a, b); }
    static SLIMLM_INLINE B bit_or(B a, B b) { return _mm256_or_si256(a, b); }
    static SLIMLM_INLINE B shift_right(B a, int n) { return n ? _mm256_srli_epi16(a, n) : a; }
    static SLIMLM_INLINE B shift_left(B a, int n) { return n ? _mm256_slli_epi16(a, n) : a; }
    static SLIMLM_INLINE B add_bytes(B a, B b) { return _mm256_add_epi8(a, b); }
    static SLIMLM_INLINE B subtract_bytes(B a, B b) { return _mm256_sub_epi8(a, b); }
    static SLIMLM_INLINE B lookup(B table, B index) { return _mm256_shuffle_epi8(table, index); }

    static SLIMLM_INLINE I zero() { return _mm256_setzero_si256(); }
    static SLIMLM_INLINE S none() { return _mm256_setzero_si256(); }
    // Compilers turn a chain of sums into a tree, keep every product until the end and run out of registers. This hides
    // from them that a sum is one.
    static SLIMLM_INLINE __m256i kept(__m256i sum) {
        asm("" : "+x"(sum));
        return sum;
    }
    static SLIMLM_INLINE I dot(I sum, B activation, B weight) { return kept(widen(sum, _mm256_maddubs_epi16(activation, weight))); }
    static SLIMLM_INLINE S dot_small(S sum, B activation, B weight) {
        return kept(_mm256_add_epi16(sum, _mm256_maddubs_epi16(activation, weight)));
    }
    static SLIMLM_INLINE S dot_codes(S sum, B code, B activation) {
        return kept(_mm256_add_epi16(sum, _mm256_maddubs_epi16(code, activation)));
    }
    static SLIMLM_INLINE I widen(I sum, S small) { return _mm256_add_epi32(sum, _mm256_madd_epi16(small, _mm256_set1_epi16(1))); }
    static SLIMLM_INLINE I add_rows(I sum, B weight) { return widen(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), weight)); }
    static SLIMLM_INLINE S add_weights(S sum, B weight) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(_mm256_set1_epi8(1), weight));
    }
    static SLIMLM_INLINE I take_128(I a, I b) { return _mm256_sub_epi32(a, _mm256_slli_epi32(b, 7)); }
    static SLIMLM_INLINE I add_256(I upper, I lower) { return _mm256_add_epi32(_mm256_slli_epi32(upper, 8), lower); }
    static SLIMLM_INLINE I add_16(I upper, I lower) { return _mm256_add_epi32(_mm256_slli_epi32(upper, 4), lower); }
    static SLIMLM_INLINE I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
    static SLIMLM_INLINE I splat_int(int32_t x) { return _mm256_set1_epi32(x); }
    static SLIMLM_INLINE I load_ints(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static SLIMLM_INLINE void store_ints(int32_t* p, I a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }

    static SLIMLM_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static SLIMLM_INLINE F splat_float(float x) { return _mm256_set1_ps(x); }
    static SLIMLM_INLINE F load_float(const float* p) { return _mm256_loadu_ps(p); }
    static SLIMLM_INLINE F load_half(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static SLIMLM_INLINE F load_bfloat(const uint16_t* p) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    }
    static SLIMLM_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
    static SLIMLM_INLINE void store_half(uint16_t* p, F a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }
    static SLIMLM_INLINE float sum(F a) {
        const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
    }
    static SLIMLM_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static SLIMLM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static SLIMLM_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace

const Variant avx2 = variant_of<Avx2>("avx2");

}  // namespace slimlm
