// 128-bit vectors with ARM's dot product of bytes. This file has run under emulation only; its speed is not known.

#include "neon.h"

namespace slimlm {
namespace {

struct NeonDot : Neon {
    using S = I;

    static SLIMLM_INLINE S none() { return zero(); }
    static SLIMLM_INLINE I dot(I sum, B activation, B weight) {
        return vdotq_s32(sum, vreinterpretq_s8_u8(activation), vreinterpretq_s8_u8(weight));
    }
    static SLIMLM_INLINE S dot_small(S sum, B activation, B weight) { return dot(sum, activation, weight); }
    static SLIMLM_INLINE S dot_codes(S sum, B code, B activation) { return dot(sum, activation, code); }
    static SLIMLM_INLINE I widen(I sum, S small) { return vaddq_s32(sum, small); }
};

}  // namespace

const Variant neondot = variant_of<NeonDot>("neondot");

}  // namespace slimlm
