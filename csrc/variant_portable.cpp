// Plain C++ for every processor: always right, never fast. Also the place where each vector operation is defined.

#define SLIMLM_PORTABLE
#include "decoder.h"

namespace slimlm {
namespace {

// kWidth: bytes of a vector. 16, 32 and 64 stand for NEON, AVX2 and AVX-512; kUnsigned: whether activations carry an offset.
template <int kWidth, bool kUnsigned>
struct Portable {
    static constexpr int kBytes = kWidth;
    static constexpr int kRowsHere = kWidth / 4;
    static constexpr int kOffset = kUnsigned ? 128 : 0;

    struct B { uint8_t v[kWidth]; };
    struct I { int32_t v[kRowsHere]; };
    struct F { float v[kRowsHere]; };
    using S = I;  // sums that are too small to need 32 bits

    static B load(const uint8_t* p) { B r; std::memcpy(r.v, p, kWidth); return r; }
    static void store_bytes(uint8_t* p, B a) { std::memcpy(p, a.v, kWidth); }
    static B splat(int x) { B r; std::memset(r.v, x, kWidth); return r; }
    // A table of sixteen bytes, for `lookup`.
    static B repeat(const int8_t* table) { return each([&](int i) { return uint8_t(table[i % 16]); }); }
    static B spread_four(const uint8_t* p) { return each([&](int i) { return p[i % 4]; }); }
    static B spread_eight(const uint8_t* p) { return each([&](int i) { return p[i % 8]; }); }
    // The third bits of a quad of 3-bit codes: step j at bit j of each byte; other bits are anything.
    static B load_third(const uint8_t* p, int half) {
        return each([&](int i) { const int byte = half * kWidth + i; return uint8_t(p[byte & 31] >> (byte < 32 ? 0 : 4)); });
    }
    // Of two: 4 where a byte is the third or fourth of its row, to pick from the second four of eight activations.
    static B second_four() { return each([](int i) { return uint8_t(i % 4 < 2 ? 0 : 4); }); }
    static B bit_and(B a, B b) { return each([&](int i) { return uint8_t(a.v[i] & b.v[i]); }); }
    static B bit_or(B a, B b) { return each([&](int i) { return uint8_t(a.v[i] | b.v[i]); }); }
    // Shifts may carry bits from byte to byte; callers mask.
    static B shift_right(B a, int n) { return each([&](int i) { return uint8_t(a.v[i] >> n); }); }
    static B shift_left(B a, int n) { return each([&](int i) { return uint8_t(a.v[i] << n); }); }
    static B add_bytes(B a, B b) { return each([&](int i) { return uint8_t(a.v[i] + b.v[i]); }); }
    static B subtract_bytes(B a, B b) { return each([&](int i) { return uint8_t(a.v[i] - b.v[i]); }); }
    // table[index], within each sixteen bytes; an index is 0 to 15.
    static B lookup(B table, B index) { return each([&](int i) { return table.v[i / 16 * 16 + index.v[i]]; }); }

    static I zero() { return I{}; }
    static S none() { return S{}; }
    // sum[row] + activation . weight over the row's four bytes; weights are signed.
    static I dot(I sum, B activation, B weight) {
        for (int r = 0; r < kRowsHere; ++r)
            for (int i = 4 * r; i < 4 * r + 4; ++i) {
                const int x = kUnsigned ? int(activation.v[i]) : int(int8_t(activation.v[i]));
                sum.v[r] += x * int8_t(weight.v[i]);
            }
        return sum;
    }
    // The same for weights of at most 15, at most four times before `widen`.
    static S dot_small(S sum, B activation, B weight) { return dot(sum, activation, weight); }
    // Unsigned codes of at most 15 by signed activations, likewise.
    static S dot_codes(S sum, B code, B activation) {
        for (int i = 0; i < kWidth; ++i) sum.v[i / 4] += int(code.v[i]) * int8_t(activation.v[i]);
        return sum;
    }
    static I widen(I sum, S small) { return each_row(sum, [&](int r) { return sum.v[r] + small.v[r]; }); }
    static I add_rows(I sum, B weight) {
        for (int i = 0; i < kWidth; ++i) sum.v[i / 4] += int8_t(weight.v[i]);
        return sum;
    }
    // The same before `widen`, at most sixteen times with sums of four bytes.
    static S add_weights(S sum, B weight) { return add_rows(sum, weight); }
    static I take_128(I a, I b) { return each_row(a, [&](int r) { return a.v[r] - 128 * b.v[r]; }); }
    static I add_256(I upper, I lower) { return each_row(upper, [&](int r) { return 256 * upper.v[r] + lower.v[r]; }); }
    static I add_16(I upper, I lower) {
        return each_row(upper, [&](int r) { return int32_t(uint32_t(upper.v[r]) * 16 + uint32_t(lower.v[r])); });
    }
    static I subtract(I a, I b) { return each_row(a, [&](int r) { return int32_t(uint32_t(a.v[r]) - uint32_t(b.v[r])); }); }
    static I splat_int(int32_t x) { return each_row(zero(), [&](int) { return x; }); }
    static I load_ints(const int32_t* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
    static void store_ints(int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }

    static F to_float(I a) { return each_float([&](int r) { return float(a.v[r]); }); }
    static F splat_float(float x) { return each_float([&](int) { return x; }); }
    static F load_float(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
    static F load_half(const uint16_t* p) { return each_float([&](int r) { return half_to_float(p[r]); }); }
    static F load_bfloat(const uint16_t* p) { return each_float([&](int r) { return bfloat_to_float(p[r]); }); }
    static void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
    static void store_half(uint16_t* p, F a) {
        for (float x : a.v) *p++ = float_to_half(x);
    }
    // The sum of all lanes.
    static float sum(F a) {
        float total = 0;
        for (float x : a.v) total += x;
        return total;
    }
    static F mul(F a, F b) { return each_float([&](int r) { return a.v[r] * b.v[r]; }); }
    static F fma(F a, F b, F c) { return each_float([&](int r) { return a.v[r] * b.v[r] + c.v[r]; }); }
    static void prefetch(const uint8_t*) {}

private:
    template <class G>
    static B each(G f) { B r; for (int i = 0; i < kWidth; ++i) r.v[i] = f(i); return r; }
    template <class G>
    static I each_row(I r, G f) { for (int i = 0; i < kRowsHere; ++i) r.v[i] = f(i); return r; }
    template <class G>
    static F each_float(G f) { F r; for (int i = 0; i < kRowsHere; ++i) r.v[i] = f(i); return r; }
};

}  // namespace

const Variant portable = variant_of<Portable<32, true>>("portable");

}  // namespace slimlm
