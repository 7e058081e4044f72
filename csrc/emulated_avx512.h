// The AVX-512 intrinsics that variant_avx512.cpp uses, written from their description as loops over arrays, so that its logic
// can be tested on a processor without them (csrc/emulate.sh). Nothing that is shipped includes this file.

#ifndef SLIMLM_EMULATED_AVX512_H
#define SLIMLM_EMULATED_AVX512_H

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "layout.h"

namespace slimlm {
namespace emulated {

struct Ints { alignas(64) uint8_t v[64]; };
struct Floats { alignas(64) float v[16]; };

// One call for each intrinsic: inlined loops of this many lanes take the compiler minutes.
#define SLIMLM_OPERATION static __attribute__((noinline, unused))

template <class T>
T lane(const Ints& a, int i) { T r; std::memcpy(&r, a.v + i * int(sizeof(T)), sizeof(T)); return r; }

template <class T, class G>
Ints each(G f) {
    Ints r;
    for (int i = 0; i < 64 / int(sizeof(T)); ++i) {
        const T x = T(f(i));
        std::memcpy(r.v + i * int(sizeof(T)), &x, sizeof(T));
    }
    return r;
}

template <class G>
Floats each_float(G f) { Floats r; for (int i = 0; i < 16; ++i) r.v[i] = f(i); return r; }

SLIMLM_OPERATION Ints loadu_si512(const void* p) { Ints r; std::memcpy(r.v, p, 64); return r; }
SLIMLM_OPERATION void storeu_si512(void* p, Ints a) { std::memcpy(p, a.v, 64); }
SLIMLM_OPERATION Ints setzero_si512() { return each<uint8_t>([](int) { return 0; }); }
SLIMLM_OPERATION Ints set1_epi8(char x) { return each<char>([&](int) { return x; }); }
SLIMLM_OPERATION Ints set1_epi32(int x) { return each<int32_t>([&](int) { return x; }); }
SLIMLM_OPERATION Ints set1_epi64(long long x) { return each<int64_t>([&](int) { return x; }); }
SLIMLM_OPERATION Ints broadcast_i32x4(__m128i a) {
    uint8_t from[16];
    std::memcpy(from, &a, 16);
    return each<uint8_t>([&](int i) { return from[i % 16]; });
}
SLIMLM_OPERATION Ints castsi256_si512(__m256i a) {
    Ints r;
    std::memset(r.v, 0xee, 64);  // the upper half is undefined
    std::memcpy(r.v, &a, 32);
    return r;
}
SLIMLM_OPERATION Ints inserti64x4(Ints a, __m256i b, int place) { std::memcpy(a.v + 32 * (place & 1), &b, 32); return a; }
SLIMLM_OPERATION Ints and_si512(Ints a, Ints b) { return each<uint8_t>([&](int i) { return a.v[i] & b.v[i]; }); }
SLIMLM_OPERATION Ints or_si512(Ints a, Ints b) { return each<uint8_t>([&](int i) { return a.v[i] | b.v[i]; }); }
SLIMLM_OPERATION Ints srli_epi16(Ints a, unsigned n) { return each<uint16_t>([&](int i) { return lane<uint16_t>(a, i) >> n; }); }
SLIMLM_OPERATION Ints slli_epi16(Ints a, unsigned n) { return each<uint16_t>([&](int i) { return lane<uint16_t>(a, i) << n; }); }
SLIMLM_OPERATION Ints slli_epi32(Ints a, unsigned n) { return each<uint32_t>([&](int i) { return lane<uint32_t>(a, i) << n; }); }
SLIMLM_OPERATION Ints add_epi8(Ints a, Ints b) { return each<uint8_t>([&](int i) { return a.v[i] + b.v[i]; }); }
SLIMLM_OPERATION Ints sub_epi8(Ints a, Ints b) { return each<uint8_t>([&](int i) { return a.v[i] - b.v[i]; }); }
SLIMLM_OPERATION Ints add_epi32(Ints a, Ints b) {
    return each<uint32_t>([&](int i) { return lane<uint32_t>(a, i) + lane<uint32_t>(b, i); });
}
SLIMLM_OPERATION Ints sub_epi32(Ints a, Ints b) {
    return each<uint32_t>([&](int i) { return lane<uint32_t>(a, i) - lane<uint32_t>(b, i); });
}
SLIMLM_OPERATION Ints shuffle_epi8(Ints a, Ints index) {
    return each<uint8_t>([&](int i) { return index.v[i] & 0x80 ? 0 : a.v[i / 16 * 16 + (index.v[i] & 15)]; });
}
// Unsigned bytes of a by signed bytes of b, four to a sum, without saturation.
SLIMLM_OPERATION Ints dpbusd_epi32(Ints sum, Ints a, Ints b) {
    return each<uint32_t>([&](int i) {
        int32_t four = 0;
        for (int k = 4 * i; k < 4 * i + 4; ++k) four += int(a.v[k]) * int(int8_t(b.v[k]));
        return lane<uint32_t>(sum, i) + uint32_t(four);
    });
}
SLIMLM_OPERATION Ints cvtepu16_epi32(__m256i a) {
    uint16_t from[16];
    std::memcpy(from, &a, 32);
    return each<uint32_t>([&](int i) { return from[i]; });
}
SLIMLM_OPERATION Floats cvtepi32_ps(Ints a) { return each_float([&](int i) { return float(lane<int32_t>(a, i)); }); }
SLIMLM_OPERATION Floats castsi512_ps(Ints a) { Floats r; std::memcpy(r.v, a.v, 64); return r; }
SLIMLM_OPERATION Floats set1_ps(float x) { return each_float([&](int) { return x; }); }
SLIMLM_OPERATION Floats loadu_ps(const void* p) { Floats r; std::memcpy(r.v, p, 64); return r; }
SLIMLM_OPERATION void storeu_ps(void* p, Floats a) { std::memcpy(p, a.v, 64); }
SLIMLM_OPERATION Floats cvtph_ps(__m256i a) {
    uint16_t from[16];
    std::memcpy(from, &a, 32);
    return each_float([&](int i) { return half_to_float(from[i]); });
}
SLIMLM_OPERATION __m256i cvtps_ph(Floats a, int) {
    uint16_t to[16];
    for (int i = 0; i < 16; ++i) to[i] = float_to_half(a.v[i]);
    __m256i r;
    std::memcpy(&r, to, 32);
    return r;
}
SLIMLM_OPERATION float reduce_add_ps(Floats a) {
    float total = 0;
    for (float x : a.v) total += x;
    return total;
}
SLIMLM_OPERATION Floats mul_ps(Floats a, Floats b) { return each_float([&](int i) { return a.v[i] * b.v[i]; }); }
SLIMLM_OPERATION Floats fmadd_ps(Floats a, Floats b, Floats c) {
    return each_float([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}

#undef SLIMLM_OPERATION

}  // namespace emulated
}  // namespace slimlm

#define __m512i slimlm::emulated::Ints
#define __m512 slimlm::emulated::Floats
#define _mm512_loadu_si512 slimlm::emulated::loadu_si512
#define _mm512_storeu_si512 slimlm::emulated::storeu_si512
#define _mm512_setzero_si512 slimlm::emulated::setzero_si512
#define _mm512_set1_epi8 slimlm::emulated::set1_epi8
#define _mm512_set1_epi32 slimlm::emulated::set1_epi32
#define _mm512_set1_epi64 slimlm::emulated::set1_epi64
#define _mm512_broadcast_i32x4 slimlm::emulated::broadcast_i32x4
#define _mm512_castsi256_si512 slimlm::emulated::castsi256_si512
#define _mm512_inserti64x4 slimlm::emulated::inserti64x4
#define _mm512_and_si512 slimlm::emulated::and_si512
#define _mm512_or_si512 slimlm::emulated::or_si512
#define _mm512_srli_epi16 slimlm::emulated::srli_epi16
#define _mm512_slli_epi16 slimlm::emulated::slli_epi16
#define _mm512_slli_epi32 slimlm::emulated::slli_epi32
#define _mm512_add_epi8 slimlm::emulated::add_epi8
#define _mm512_sub_epi8 slimlm::emulated::sub_epi8
#define _mm512_add_epi32 slimlm::emulated::add_epi32
#define _mm512_sub_epi32 slimlm::emulated::sub_epi32
#define _mm512_shuffle_epi8 slimlm::emulated::shuffle_epi8
#define _mm512_dpbusd_epi32 slimlm::emulated::dpbusd_epi32
#define _mm512_cvtepu16_epi32 slimlm::emulated::cvtepu16_epi32
#define _mm512_cvtepi32_ps slimlm::emulated::cvtepi32_ps
#define _mm512_castsi512_ps slimlm::emulated::castsi512_ps
#define _mm512_set1_ps slimlm::emulated::set1_ps
#define _mm512_loadu_ps slimlm::emulated::loadu_ps
#define _mm512_storeu_ps slimlm::emulated::storeu_ps
#define _mm512_cvtph_ps slimlm::emulated::cvtph_ps
#define _mm512_reduce_add_ps slimlm::emulated::reduce_add_ps
#define _mm512_cvtps_ph slimlm::emulated::cvtps_ph
#define _mm512_mul_ps slimlm::emulated::mul_ps
#define _mm512_fmadd_ps slimlm::emulated::fmadd_ps

#endif
