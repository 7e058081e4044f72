// 128-bit vectors of every 64-bit ARM processor. This file has run under emulation only; its speed is not known.

#include "neon.h"

namespace slimlm {
namespace {

struct NeonMultiply : Neon {
    // A product of bytes for each byte of a row: 16 bits hold four of at most 15 x 128, and two of their neighbours' sums.
    struct S { int16x8_t low, high; };

    static SLIMLM_INLINE S none() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
    static SLIMLM_INLINE I dot(I sum, B activation, B weight) {
        const int8x16_t a = vreinterpretq_s8_u8(activation), w = vreinterpretq_s8_u8(weight);
        return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(w)), vmull_high_s8(a, w)));
    }
    static SLIMLM_INLINE S dot_small(S sum, B activation, B weight) {
        const int8x16_t a = vreinterpretq_s8_u8(activation), w = vreinterpretq_s8_u8(weight);
        return {vmlal_s8(sum.low, vget_low_s8(a), vget_low_s8(w)), vmlal_high_s8(sum.high, a, w)};
    }
    static SLIMLM_INLINE S dot_codes(S sum, B code, B activation) { return dot_small(sum, activation, code); }
    static SLIMLM_INLINE I widen(I sum, S small) { return vpadalq_s16(sum, vpaddq_s16(small.low, small.high)); }
};

}  // namespace

const Variant neon = variant_of<NeonMultiply>("neon");

}  // namespace slimlm
