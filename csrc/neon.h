// What the two variants for 64-bit ARM share: all but the dot products. Activations are signed, without an offset.

#ifndef SLIMLM_NEON_H
#define SLIMLM_NEON_H

#include <arm_neon.h>

#include "decoder.h"

namespace slimlm {
namespace {

struct Neon {
    static constexpr int kBytes = 16, kOffset = 0;
    using B = uint8x16_t;
    using I = int32x4_t;
    using F = float32x4_t;

    static SLIMLM_INLINE B load(const uint8_t* p) { return vld1q_u8(p); }
    static SLIMLM_INLINE void store_bytes(uint8_t* p, B a) { vst1q_u8(p, a); }
    static SLIMLM_INLINE B splat(int x) { return vdupq_n_u8(uint8_t(x)); }
    static SLIMLM_INLINE B repeat(const int8_t* table) { return vreinterpretq_u8_s8(vld1q_s8(table)); }
    static SLIMLM_INLINE B spread_four(const uint8_t* p) {
        uint32_t x;
        std::memcpy(&x, p, 4);
        return vreinterpretq_u8_u32(vdupq_n_u32(x));
    }
    static SLIMLM_INLINE B spread_eight(const uint8_t* p) {
        const uint8x8_t x = vld1_u8(p);
        return vcombine_u8(x, x);
    }
    static SLIMLM_INLINE B load_third(const uint8_t* p, int half) {
        const B both = vld1q_u8(p + half % 2 * 16);
        return half < 2 ? both : vshrq_n_u8(both, 4);
    }
    static SLIMLM_INLINE B second_four() { return vreinterpretq_u8_u32(vdupq_n_u32(0x04040000)); }
    static SLIMLM_INLINE B bit_and(B a, B b) { return vandq_u8(a, b); }
    static SLIMLM_INLINE B bit_or(B a, B b) { return vorrq_u8(a, b); }
    static SLIMLM_INLINE B shift_right(B a, int n) { return vshlq_u8(a, vdupq_n_s8(int8_t(-n))); }
    static SLIMLM_INLINE B shift_left(B a, int n) { return vshlq_u8(a, vdupq_n_s8(int8_t(n))); }
    static SLIMLM_INLINE B subtract_bytes(B a, B b) { return vsubq_u8(a, b); }
    static SLIMLM_INLINE B lookup(B table, B index) { return vqtbl1q_u8(table, index); }

    static SLIMLM_INLINE I zero() { return vdupq_n_s32(0); }
    static SLIMLM_INLINE I add_256(I upper, I lower) { return vaddq_s32(vshlq_n_s32(upper, 8), lower); }
    static SLIMLM_INLINE I add_16(I upper, I lower) { return vaddq_s32(vshlq_n_s32(upper, 4), lower); }
    static SLIMLM_INLINE I subtract(I a, I b) { return vsubq_s32(a, b); }
    static SLIMLM_INLINE I splat_int(int32_t x) { return vdupq_n_s32(x); }
    static SLIMLM_INLINE I load_ints(const int32_t* p) { return vld1q_s32(p); }
    static SLIMLM_INLINE void store_ints(int32_t* p, I a) { vst1q_s32(p, a); }

    static SLIMLM_INLINE F to_float(I a) { return vcvtq_f32_s32(a); }
    static SLIMLM_INLINE F splat_float(float x) { return vdupq_n_f32(x); }
    static SLIMLM_INLINE F load_float(const float* p) { return vld1q_f32(p); }
    static SLIMLM_INLINE F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static SLIMLM_INLINE F load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static SLIMLM_INLINE void store(float* p, F a) { vst1q_f32(p, a); }
    static SLIMLM_INLINE void store_half(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
    static SLIMLM_INLINE float sum(F a) { return vaddvq_f32(a); }
    static SLIMLM_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
    static SLIMLM_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static SLIMLM_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace slimlm

#endif
