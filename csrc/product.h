// The products, written once for vectors of any width. A variant says what a vector is (see variant_portable.cpp for the
// meaning of each operation) and instantiates `products`.
//
// Activations become integers, one scale per 128 of them ("fast" 8 bits; "precise" 16 bits, held as two planes of bytes).
// A vector holds 4 weights of each of its rows; `dot` multiplies them by the 4 activations they belong to and adds up per
// row: for 2:4 the activations are picked from 8 by a byte shuffle. Where the processor multiplies unsigned by signed
// bytes, activations carry an offset of 128, and 128 times the sum of the weights is taken off again.

#ifndef SLIMLM_PRODUCT_H
#define SLIMLM_PRODUCT_H

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "blob.h"
#include "kernels.h"
#include "layout.h"
#include "pool.h"

// The portable variant leaves both to the compiler: its vectors are arrays, and unrolled arrays take minutes to compile.
#if defined(SLIMLM_PORTABLE)
#define SLIMLM_INLINE inline
#define SLIMLM_UNROLL(n)
#else
#define SLIMLM_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define SLIMLM_UNROLL(n) _Pragma("clang loop unroll(full)")
#else
#define SLIMLM_PRAGMA(text) _Pragma(#text)
#define SLIMLM_UNROLL(n) SLIMLM_PRAGMA(GCC unroll n)
#endif
#endif

namespace slimlm {

constexpr int64_t kBatchAtOnce = 128;
constexpr int kFew = 4;
constexpr int kMany = 8;
constexpr int64_t kTilesTogether = 4;

// What a product of one matrix adds up: one or two tables of levels, one or two planes of activations.
enum Mode { kEven, kEvenPrecise, kTable, kTablePrecise, kWide, kWidePrecise };

constexpr bool two_weights(Mode mode) { return mode == kTablePrecise || mode == kWide || mode == kWidePrecise; }
constexpr bool two_planes(Mode mode) { return mode == kEvenPrecise || mode == kTablePrecise || mode == kWidePrecise; }
constexpr bool large(Mode mode) { return mode == kTable || mode == kTablePrecise; }
constexpr bool wide(Mode mode) { return mode == kWide || mode == kWidePrecise; }
// The products of both lower halves are below the precision of the precise mode, and are left out for codebooks.
constexpr bool has_term(Mode mode, int weight, int plane) { return !(mode == kTablePrecise && weight == 1 && plane == 1); }
// Dense codes of an even grid multiply as they are, unsigned, by signed activations: what is too much is the same for all
// rows, half the range of the codes times the sum of the activations.
constexpr bool as_codes(bool sparse, Mode mode) { return !sparse && !large(mode); }
constexpr float first_weight(Mode mode) { return mode == kTablePrecise ? 64.f : wide(mode) ? 16.f : 1.f; }

// Memory on a multiple of 64 bytes that only grows.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }
    template <class T>
    T* get(int64_t count) {
        const size_t bytes = (size_t(count) * sizeof(T) + 127) / 64 * 64;
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = nullptr;
            if (posix_memalign(&data_, 64, bytes)) throw std::bad_alloc();
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// Activations as bytes: [columns of the batch / wide][padded / 8][wide][8], and a scale for each group of 128.
struct Quantized {
    int64_t batch = 0, padded = 0, filled_ = 0;
    int groups = 0, wide = 1;
    bool precise = false, as_signed = false;
    uint8_t *upper = nullptr, *lower = nullptr;
    float* scale = nullptr;   // [groups][batch, filled up to a multiple of wide]
    uint32_t* sums = nullptr;  // [padded / 32 + 1][batch, filled up]: of all activations before, where they are signed
    Scratch bytes, scales, blocks;

    void prepare(int64_t batch_, const MatrixHeader* m, bool precise_) {
        batch = batch_;
        padded = m->padded;
        groups = m->groups;
        precise = precise_;
        wide = batch == 1 ? 1 : batch <= kFew ? kFew : kMany;
        filled_ = (batch + wide - 1) / wide * wide;
        const int64_t size = filled() * padded;
        upper = bytes.get<uint8_t>(2 * size + 64);
        lower = upper + size;
        scale = scales.get<float>(filled() * groups);
        as_signed = wants_signed(m);
        sums = blocks.get<uint32_t>(filled() * (padded / kBlock + 1));
        std::memset(sums, 0, size_t(filled()) * sizeof(uint32_t));
        if (filled() != batch) {
            std::memset(sums, 0, size_t(filled() * (padded / kBlock + 1)) * sizeof(uint32_t));
            std::memset(upper, 0, size_t(2 * size));
            std::memset(scale, 0, size_t(filled() * groups) * sizeof(float));
        }
    }
    static bool wants_signed(const MatrixHeader* m) { return !m->sparse && !m->codebook; }
    int64_t filled() const { return filled_; }
    int64_t offset(int64_t b, int64_t place) const {
        return b / wide * (padded * wide) + place / 8 * (8 * wide) + b % wide * 8;
    }
};

template <class V>
struct Kernel {
    using B = typename V::B;
    using S = typename V::S;
    using I = typename V::I;
    using F = typename V::F;
    static constexpr int kHalves = 64 / V::kBytes;
    static constexpr int kLanes = kRows / kHalves;

    // Quantizing

    // One group of activations of column b of the batch, already gathered and scaled: tmp [count], a multiple of 32.
    static void store_group(const float* tmp, int count, int64_t b, int64_t place, int group, Quantized& q) {
        // Sizes are compared as integers: their order is that of the floats, with NaN the largest.
        alignas(64) uint32_t bits[kActivationGroup];
        std::memcpy(bits, tmp, size_t(count) * 4);
        uint32_t largest = 0;
        for (int i = 0; i < count; ++i) {
            const uint32_t size = bits[i] & 0x7fffffff;
            largest = largest > size ? largest : size;
        }
        float peak;
        std::memcpy(&peak, &largest, 4);
        const float limit = q.precise ? 32511.f : 127.f;
        float scale = peak / limit, inverse = limit / peak;
        if (largest >= 0x7f800000) {  // an infinity or NaN makes all outputs of its row NaN
            scale = NAN;
            inverse = 0;
        } else if (!(inverse <= 3e38f)) {  // all zero, or too small to matter
            scale = 0;
            inverse = 0;
        }
        q.scale[group * q.filled() + b] = scale;
        constexpr float kMagic = 12582912.f;  // 1.5 x 2^23: adding it rounds to an integer, ties to even
        alignas(64) float rounded[kActivationGroup];
        alignas(64) int32_t value[kActivationGroup];
        for (int i = 0; i < count; ++i) rounded[i] = tmp[i] * inverse + kMagic;
        std::memcpy(value, rounded, size_t(count) * 4);
        for (int i = 0; i < count; ++i) value[i] -= 0x4b400000;
        if (largest >= 0x7f800000) std::memset(value, 0, sizeof value);
        if (q.as_signed)
            for (int i = 0; i < count; i += kBlock) {
                int32_t sum = 0;
                for (int k = 0; k < kBlock; ++k) sum += value[i + k];
                uint32_t* before = q.sums + (place + i) / kBlock * q.filled() + b;
                before[q.filled()] = before[0] + uint32_t(sum);
            }
        const int offset = q.as_signed ? 0 : V::kOffset;
        alignas(64) uint8_t upper[kActivationGroup], lower[kActivationGroup];
        if (!q.precise) {
            for (int i = 0; i < count; ++i) upper[i] = uint8_t(value[i] + offset);
        } else {
            for (int i = 0; i < count; ++i) {
                const int32_t low = int8_t(uint8_t(value[i]));
                upper[i] = uint8_t(((value[i] - low) >> 8) + offset);
                lower[i] = uint8_t(low + offset);
            }
        }
        const int64_t start = q.offset(b, place);
        const int64_t step = 8 * q.wide;
        for (int i = 0; i < count / 8; ++i) std::memcpy(q.upper + start + i * step, upper + 8 * i, 8);
        if (q.precise)
            for (int i = 0; i < count / 8; ++i) std::memcpy(q.lower + start + i * step, lower + 8 * i, 8);
    }

    // Column b of the batch, x [columns]; `fold` says which row of the folded scales multiplies it, or -1.
    static void quantize(const MatrixHeader* m, const float* x, int64_t b, int fold, Quantized& q) {
        const auto* map = at<int32_t>(m, m->map);
        const auto* input_scale = at<float>(m, m->input_scale);
        const auto* first = at<int32_t>(m, m->first_piece);
        const auto* pieces = at<Piece>(m, m->piece_list);
        alignas(64) float tmp[kActivationGroup];
        int64_t place = 0;
        for (int g = 0; g < m->groups; ++g) {
            int count = 0;
            for (int p = first[g]; p < first[g + 1]; ++p) count += pieces[p].blocks * kBlock;
            const int real = int(std::min<int64_t>(count, m->columns - place));
            if (map) {
                for (int i = 0; i < count; ++i) tmp[i] = map[place + i] < 0 ? 0 : x[map[place + i]];
                if (input_scale)
                    for (int i = 0; i < count; ++i) tmp[i] *= map[place + i] < 0 ? 0 : input_scale[map[place + i]];
            } else {
                if (fold >= 0)
                    fold_in(m, fold, x, place, real, tmp);
                else if (input_scale)
                    for (int i = 0; i < real; ++i) tmp[i] = x[place + i] * input_scale[place + i];
                else
                    std::memcpy(tmp, x + place, size_t(real) * 4);
                for (int i = real; i < count; ++i) tmp[i] = 0;
            }
            store_group(tmp, count, b, place, g, q);
            place += count;
        }
    }

    static void fold_in(const MatrixHeader* m, int fold, const float* x, int64_t place, int real, float* tmp) {
        const int64_t start = int64_t(fold) * m->columns + place;
        if (m->fold_type == SLIMLM_F32) {
            const float* scale = at<float>(m, m->fold) + start;
            for (int i = 0; i < real; ++i) tmp[i] = x[place + i] * scale[i];
            return;
        }
        const uint16_t* scale = at<uint16_t>(m, m->fold) + start;
        int i = 0;
        for (; i + kLanes <= real; i += kLanes)
            V::store(tmp + i, V::mul(V::load_float(x + place + i), V::load_half(scale + i)));
        for (; i < real; ++i) tmp[i] = x[place + i] * half_to_float(scale[i]);
    }

    // Reading quads

    template <bool kSparse, int kBits, bool kWideCodes>
    struct Quad {
        B positions, first[2], third, second[2];

        SLIMLM_INLINE Quad(const uint8_t* quad, int half) {
            const uint8_t* at = quad + half * V::kBytes;
            if constexpr (kSparse) {
                positions = V::load(at);
                at += 64;
            }
            first[0] = V::load(at);
            if constexpr (kBits == 4) first[1] = V::load(at + 64);
            if constexpr (kBits == 3) third = V::load_third(quad + (kSparse ? 64 : 0) + 64, half);
            if constexpr (kWideCodes) {
                constexpr int kPlane = kBits == 4 ? 128 : kBits == 3 ? 96 : 64;
                second[0] = V::load(at + kPlane);
                second[1] = V::load(at + kPlane + 64);
            }
        }
        SLIMLM_INLINE B control(int j) const {
            return V::bit_or(V::bit_and(V::shift_right(positions, 2 * j), V::splat(3)), V::second_four());
        }
        SLIMLM_INLINE B code(int j) const {
            if constexpr (kBits == 4) return nibble(first, j);
            const B low = V::bit_and(V::shift_right(first[0], 2 * j), V::splat(3));
            if constexpr (kBits == 2) return low;
            const B high = j < 2 ? V::shift_left(third, 2 - j) : V::shift_right(third, j - 2);
            return V::bit_or(low, V::bit_and(high, V::splat(4)));
        }
        SLIMLM_INLINE B low_code(int j) const { return nibble(second, j); }
        static SLIMLM_INLINE B nibble(const B* plane, int j) {
            const B both = plane[j / 2];
            return V::bit_and(j & 1 ? V::shift_right(both, 4) : both, V::splat(15));
        }
    };

    // What makes weights of codes: tables of levels, or the code that stands for zero on an even grid.
    struct Tables {
        B first, second;
        Tables(const MatrixHeader* m, Mode mode)
            : first(large(mode) ? V::repeat(mode == kTablePrecise ? m->upper : m->fast) : V::splat(-m->fast[0])),
              second(V::repeat(m->lower)) {}
    };

    // The weights of step j, [kWeights].
    template <bool kSparse, Mode kMode, class Q, int kWeights>
    static SLIMLM_INLINE void weights_of(const Q& read, int j, const Tables& tables, B (&weight)[kWeights]) {
        const B code = read.code(j);
        if constexpr (large(kMode))
            weight[0] = V::lookup(tables.first, code);
        else if constexpr (as_codes(kSparse, kMode))
            weight[0] = code;
        else
            weight[0] = V::subtract_bytes(code, tables.first);
        if constexpr (wide(kMode))
            weight[1] = read.low_code(j);
        else if constexpr (kWeights == 2)
            weight[1] = V::lookup(tables.second, code);
    }

    static float unit(const MatrixHeader* m, Mode mode) { return two_planes(mode) ? m->unit_precise : m->unit_fast; }

    static SLIMLM_INLINE F scale_of(int kind, const uint8_t* scales, int half) {
        return kind == kHalfPerPiece ? V::load_half(reinterpret_cast<const uint16_t*>(scales) + half * kLanes)
                                     : V::load_float(reinterpret_cast<const float*>(scales) + half * kLanes);
    }

    // The sums of one weight table against upper and lower plane as one number; weights: the sum of the weights of each row.
    template <Mode kMode, int kWeight>
    static SLIMLM_INLINE F joined(I upper, I lower, I weights) {
        if constexpr (V::kOffset != 0) upper = V::take_128(upper, weights);
        if constexpr (two_planes(kMode)) {
            if constexpr (has_term(kMode, kWeight, 1)) {
                if constexpr (V::kOffset != 0) lower = V::take_128(lower, weights);
                return V::to_float(V::add_256(upper, lower));
            }
            return V::mul(V::to_float(upper), V::splat_float(256.f));
        }
        return V::to_float(upper);
    }

    // The same for unsigned codes: sum [kWeights][kPlanes], and the sum of the activations times the code of zero.
    template <Mode kMode, int kWeights, int kPlanes>
    static SLIMLM_INLINE F joined_codes(const I (&sum)[kWeights][kPlanes], int32_t too_much) {
        I total = two_planes(kMode) ? V::add_256(sum[0][0], sum[0][kPlanes - 1]) : sum[0][0];
        if constexpr (kWeights == 2)
            total = V::add_16(total, two_planes(kMode) ? V::add_256(sum[1][0], sum[1][kPlanes - 1]) : sum[1][0]);
        return V::to_float(V::subtract(total, V::splat_int(too_much)));
    }

    // Sum of column b's activations over some blocks of 32.
    static SLIMLM_INLINE uint32_t activations(const Quantized& q, int64_t block, int blocks, int64_t b) {
        const uint32_t* before = q.sums + block * q.filled() + b;
        return before[blocks * q.filled()] - before[0];
    }

    // The same times the code that stands for zero on a symmetric grid.
    static SLIMLM_INLINE int32_t too_much(const MatrixHeader* m, const Quantized& q, int64_t block, int blocks, int64_t b) {
        return int32_t(activations(q, block, blocks, b) << (m->bits - 1));
    }

    template <Mode kMode>
    static SLIMLM_INLINE F both_weights(F first, F second) {
        if constexpr (two_weights(kMode)) return V::fma(first, V::splat_float(first_weight(kMode)), second);
        return first;
    }

    // Few columns: codes are read and used at once

    // Adds tile t times kColumns columns of the batch to out [kColumns][16].
    template <bool kSparse, int kBits, Mode kMode, int kColumns>
    static void few(const MatrixHeader* m, int64_t t, const Quantized& q, float* out) {
        constexpr int kWeights = two_weights(kMode) ? 2 : 1, kPlanes = two_planes(kMode) ? 2 : 1;
        // Parts of a tile that are taken at once: all where the sums fit the registers, else one after another.
        constexpr int kTogether = kColumns == 1 && kWeights * kPlanes <= 2 ? kHalves : 1;
        constexpr int kQuadBytes =
            (kSparse ? 64 : 0) + (kBits == 4 ? 128 : kBits == 3 ? 96 : 64) + (wide(kMode) ? 128 : 0);
        constexpr int kInputBytes = (kSparse ? 32 : 16) * kColumns;
        const Tables tables(m, kMode);
        const auto* first = at<int32_t>(m, m->first_piece);
        const auto* pieces = at<Piece>(m, m->piece_list);
        const int kind = m->scale_kind, scales = scale_bytes(kind), zeros = zero_bytes(*m);
        const uint8_t* tile = at<uint8_t>(m, m->data) + t * m->tile_bytes;
        const uint8_t* data = tile + 4 * kRows;
        const int64_t to_lower = q.lower - q.upper;
        const uint8_t* x = q.upper;
        int64_t block = 0;
        F total[kHalves][kColumns];
        for (int h = 0; h < kHalves; ++h)
            for (int b = 0; b < kColumns; ++b) total[h][b] = V::splat_float(0);
        for (int g = 0; g < m->groups; ++g) {
            const uint8_t *end = data, *x_end = x;
            int64_t block_end = block;
            for (int half = 0; half < kHalves; half += kTogether) {
                const uint8_t *next = data, *from = x;
                int64_t own_block = block;
                F part[kTogether][kColumns];
                for (int h = 0; h < kTogether; ++h)
                    for (int b = 0; b < kColumns; ++b) part[h][b] = V::splat_float(0);
                for (int p = first[g]; p < first[g + 1]; ++p) {
                    Sums<kTogether, kWeights, kPlanes, kColumns> sums;
                    const uint8_t* own_scales = next;
                    next += scales + zeros;
                    const uint8_t* stop = next + quads_of(pieces[p].blocks, kSparse) * kQuadBytes;
                    for (; next != stop; next += kQuadBytes, from += kInputBytes) {
                        if (half == 0) {
                            V::prefetch(next + 2048);
                            V::prefetch(next + 2112);
                            if constexpr (kQuadBytes > 128) V::prefetch(next + 2176);
                        }
                        one_quad<kSparse, kBits, kMode>(next, half, from, to_lower, tables, sums);
                    }
SLIMLM_UNROLL(4)
                    for (int h = 0; h < kTogether; ++h) {
                        const F scale = kind == kRowScale ? V::splat_float(1) : scale_of(kind, own_scales, half + h);
                        F value[kColumns];
SLIMLM_UNROLL(4)
                        for (int b = 0; b < kColumns; ++b)
                            value[b] = value_of_sums<kSparse, kMode>(sums, h, b, m, q, own_block, pieces[p].blocks);
                        if constexpr (as_codes(kSparse, kMode))
                            if (zeros) take_zeros(own_scales + scales, half + h, q, own_block, pieces[p].blocks, value);
SLIMLM_UNROLL(4)
                        for (int b = 0; b < kColumns; ++b) part[h][b] = V::fma(value[b], scale, part[h][b]);
                    }
                    own_block += pieces[p].blocks;
                }
SLIMLM_UNROLL(4)
                for (int h = 0; h < kTogether; ++h)
SLIMLM_UNROLL(4)
                    for (int b = 0; b < kColumns; ++b)
                        total[half + h][b] = V::fma(part[h][b], V::splat_float(q.scale[g * kColumns + b]), total[half + h][b]);
                end = next;
                x_end = from;
                block_end = own_block;
            }
            data = end;
            x = x_end;
            block = block_end;
        }
        finish(m, kMode, tile, total, out);
    }

    template <int kTogether, int kWeights, int kPlanes, int kColumns>
    struct Sums {
        I sum[kTogether][kWeights][kPlanes][kColumns];
        S weights[kTogether][kWeights];
        SLIMLM_INLINE Sums() {
            for (int h = 0; h < kTogether; ++h)
                for (int w = 0; w < kWeights; ++w) {
                    weights[h][w] = V::none();
                    for (int x = 0; x < kPlanes; ++x)
                        for (int b = 0; b < kColumns; ++b) sum[h][w][x][b] = V::zero();
                }
        }
    };

    template <bool kSparse, Mode kMode, int kTogether, int kWeights, int kPlanes, int kColumns>
    static SLIMLM_INLINE F value_of_sums(const Sums<kTogether, kWeights, kPlanes, kColumns>& sums, int h, int b,
                                         const MatrixHeader* m, const Quantized& q, int64_t block, int blocks) {
        const auto& all = sums.sum[h];
        if constexpr (as_codes(kSparse, kMode)) {
            I own[kWeights][kPlanes];
            for (int w = 0; w < kWeights; ++w)
                for (int p = 0; p < kPlanes; ++p) own[w][p] = all[w][p][b];
            return joined_codes<kMode>(own, too_much(m, q, block, blocks, b));
        } else {
            const I of_first = V::widen(V::zero(), sums.weights[h][0]);
            const F value = joined<kMode, 0>(all[0][0][b], all[0][kPlanes - 1][b], of_first);
            if constexpr (kWeights == 2) {
                const I of_second = V::widen(V::zero(), sums.weights[h][1]);
                return both_weights<kMode>(value, joined<kMode, 1>(all[1][0][b], all[1][kPlanes - 1][b], of_second));
            }
            return value;
        }
    }

    // Subtracts from the values of a piece its rows' zeros times the sums of its activations.
    template <int kColumns>
    static SLIMLM_INLINE void take_zeros(const uint8_t* zeros, int half, const Quantized& q, int64_t block, int blocks,
                                         F (&value)[kColumns]) {
        const F zero = V::load_half(reinterpret_cast<const uint16_t*>(zeros) + half * kLanes);
SLIMLM_UNROLL(4)
        for (int b = 0; b < kColumns; ++b)
            value[b] = V::fma(zero, V::splat_float(-float(int32_t(activations(q, block, blocks, b)))), value[b]);
    }

    template <int kColumns>
    static SLIMLM_INLINE void finish(const MatrixHeader* m, Mode mode, const uint8_t* tile, F (*total)[kColumns], float* out) {
        for (int h = 0; h < kHalves; ++h) {
            const F row = V::mul(V::load_float(reinterpret_cast<const float*>(tile) + h * kLanes), V::splat_float(unit(m, mode)));
            for (int b = 0; b < kColumns; ++b) {
                float* to = out + b * kRows + h * kLanes;
                V::store(to, V::fma(total[h][b], row, V::load_float(to)));
            }
        }
    }

    template <bool kSparse, int kBits, Mode kMode, int kTogether, int kWeights, int kPlanes, int kColumns>
    static SLIMLM_INLINE void one_quad(const uint8_t* quad, int half, const uint8_t* x, int64_t to_lower, const Tables& tables,
                                       Sums<kTogether, kWeights, kPlanes, kColumns>& sums) {
        S small[kTogether][kWeights][kPlanes][kColumns];
        for (int h = 0; h < kTogether; ++h)
            for (int w = 0; w < kWeights; ++w)
                for (int p = 0; p < kPlanes; ++p)
                    for (int b = 0; b < kColumns; ++b) small[h][w][p][b] = V::none();
        B of_weights[kTogether][kWeights];
SLIMLM_UNROLL(4)
        for (int j = 0; j < 4; ++j) {
            B weight[kTogether][kWeights], control[kTogether];
SLIMLM_UNROLL(4)
            for (int h = 0; h < kTogether; ++h) {
                const Quad<kSparse, kBits, wide(kMode)> read(quad, half + h);
                weights_of<kSparse, kMode>(read, j, tables, weight[h]);
                if constexpr (kSparse) control[h] = read.control(j);
                if constexpr (V::kOffset != 0 && !as_codes(kSparse, kMode)) {
                    for (int w = 0; w < kWeights; ++w) {
                        // Bytes overflow after two steps where levels are large, after four where they are not.
                        const bool begins = j == 0 || (large(kMode) && j == 2), ends = j == 3 || (large(kMode) && j == 1);
                        of_weights[h][w] = begins ? weight[h][w] : V::add_bytes(of_weights[h][w], weight[h][w]);
                        if (ends) sums.weights[h][w] = V::add_weights(sums.weights[h][w], of_weights[h][w]);
                    }
                }
            }
SLIMLM_UNROLL(4)
            for (int b = 0; b < kColumns; ++b) {
SLIMLM_UNROLL(2)
                for (int p = 0; p < kPlanes; ++p) {
                    const uint8_t* from = x + (p ? to_lower : 0) + place(kSparse, kColumns, j, b);
                    const B spread = kSparse ? V::spread_eight(from) : V::spread_four(from);
SLIMLM_UNROLL(4)
                    for (int h = 0; h < kTogether; ++h) {
                        B activation = spread;
                        if constexpr (kSparse) activation = V::lookup(spread, control[h]);
SLIMLM_UNROLL(2)
                        for (int w = 0; w < kWeights; ++w) {
                            if (!has_term(kMode, w, p)) continue;
                            if constexpr (large(kMode))
                                sums.sum[h][w][p][b] = V::dot(sums.sum[h][w][p][b], activation, weight[h][w]);
                            else if constexpr (as_codes(kSparse, kMode))
                                small[h][w][p][b] = V::dot_codes(small[h][w][p][b], weight[h][w], activation);
                            else
                                small[h][w][p][b] = V::dot_small(small[h][w][p][b], activation, weight[h][w]);
                        }
                    }
                }
            }
        }
        if constexpr (!large(kMode))
            for (int h = 0; h < kTogether; ++h)
                for (int w = 0; w < kWeights; ++w)
                    for (int p = 0; p < kPlanes; ++p)
                        for (int b = 0; b < kColumns; ++b) sums.sum[h][w][p][b] = V::widen(sums.sum[h][w][p][b], small[h][w][p][b]);
    }

    // Where in [places / 8][columns][8] the activations of step j of column b begin, from the quad's first place on.
    static constexpr int place(bool sparse, int columns, int j, int b) {
        return sparse ? j * 8 * columns + b * 8 : j / 2 * 8 * columns + b * 8 + j % 2 * 4;
    }

    // Many columns: a group of 128 inputs of one tile is decoded once

    struct Decoded {
        alignas(64) uint8_t control[16][64];     // 2:4: at most 4 quads of 4 steps
        alignas(64) uint8_t weight[2][32][64];   // dense: at most 8 quads of 4 steps
        alignas(64) int32_t sums[2][4][kRows];   // of the weights, per piece
        alignas(64) float scale[4][kRows];
        alignas(64) float zero[4][kRows];
    };

    template <bool kSparse, int kBits, Mode kMode>
    static const uint8_t* decode(const MatrixHeader* m, const Tables& tables, int g, const uint8_t* data, Decoded& to) {
        constexpr int kWeights = two_weights(kMode) ? 2 : 1;
        constexpr int kQuadBytes =
            (kSparse ? 64 : 0) + (kBits == 4 ? 128 : kBits == 3 ? 96 : 64) + (wide(kMode) ? 128 : 0);
        const auto* first = at<int32_t>(m, m->first_piece);
        const auto* pieces = at<Piece>(m, m->piece_list);
        int step = 0;
        for (int p = first[g]; p < first[g + 1]; ++p) {
            const int own = p - first[g];
            for (int half = 0; half < kHalves; ++half)
                V::store(to.scale[own] + half * kLanes,
                         m->scale_kind == kRowScale ? V::splat_float(1) : scale_of(m->scale_kind, data, half));
            data += scale_bytes(m->scale_kind);
            if (m->zeros)
                for (int half = 0; half < kHalves; ++half)
                    V::store(to.zero[own] + half * kLanes, V::load_half(reinterpret_cast<const uint16_t*>(data) + half * kLanes));
            data += zero_bytes(*m);
            I weights[kWeights][kHalves];
            for (int w = 0; w < kWeights; ++w)
                for (int h = 0; h < kHalves; ++h) weights[w][h] = V::zero();
            for (int n = quads_of(pieces[p].blocks, kSparse); n > 0; --n, data += kQuadBytes, step += 4)
                for (int half = 0; half < kHalves; ++half) {
                    const Quad<kSparse, kBits, wide(kMode)> read(data, half);
SLIMLM_UNROLL(4)
                    for (int j = 0; j < 4; ++j) {
                        B weight[kWeights];
                        weights_of<kSparse, kMode>(read, j, tables, weight);
                        if constexpr (kSparse) V::store_bytes(to.control[step + j] + half * V::kBytes, read.control(j));
                        for (int w = 0; w < kWeights; ++w) {
                            V::store_bytes(to.weight[w][step + j] + half * V::kBytes, weight[w]);
                            if constexpr (V::kOffset != 0 && !as_codes(kSparse, kMode))
                                weights[w][half] = V::add_rows(weights[w][half], weight[w]);
                        }
                    }
                }
            for (int w = 0; w < kWeights; ++w)
                for (int h = 0; h < kHalves; ++h) V::store_ints(to.sums[w][own] + h * kLanes, weights[w][h]);
        }
        return data;
    }

    // Adds kQuads quads of kMany columns, one weight table against one plane, to sum.
    template <bool kSparse, Mode kMode, int kQuads>
    static SLIMLM_INLINE void some_quads(const uint8_t (*control)[64], const uint8_t (*weight)[64], int half, const uint8_t* x,
                                         I (&sum)[kMany]) {
        S small[kMany];
        for (int b = 0; b < kMany; ++b) small[b] = V::none();
SLIMLM_UNROLL(8)
        for (int j = 0; j < 4 * kQuads; ++j) {
            B pick;
            if constexpr (kSparse) pick = V::load(control[j] + half * V::kBytes);
            const B w = V::load(weight[j] + half * V::kBytes);
SLIMLM_UNROLL(8)
            for (int b = 0; b < kMany; ++b) {
                const uint8_t* from = x + place(kSparse, kMany, j, b);
                B activation;
                if constexpr (kSparse)
                    activation = V::lookup(V::spread_eight(from), pick);
                else
                    activation = V::spread_four(from);
                if constexpr (large(kMode))
                    sum[b] = V::dot(sum[b], activation, w);
                else if constexpr (as_codes(kSparse, kMode))
                    small[b] = V::dot_codes(small[b], w, activation);
                else
                    small[b] = V::dot_small(small[b], activation, w);
            }
        }
        if constexpr (!large(kMode))
            for (int b = 0; b < kMany; ++b) sum[b] = V::widen(sum[b], small[b]);
    }

    // Integer sums of kMany columns over a piece of `quads` quads.
    template <bool kSparse, Mode kMode>
    static SLIMLM_INLINE void sums(const uint8_t (*control)[64], const uint8_t (*weight)[64], int quads, int half,
                                   const uint8_t* x, I (&sum)[kMany]) {
        // Sixteen bits hold eight steps of codes (15 x 128 x 2 x 8) and of weights up to 8 in size (8 x 255 x 2 x 8).
        constexpr bool kTwo = as_codes(kSparse, kMode) || kMode == kEven || kMode == kEvenPrecise;
        constexpr int kBytes = (kSparse ? 32 : 16) * kMany;
        for (int b = 0; b < kMany; ++b) sum[b] = V::zero();
        int n = 0;
        if constexpr (kTwo)
            for (; n + 2 <= quads; n += 2)
                some_quads<kSparse, kMode, 2>(control + 4 * n, weight + 4 * n, half, x + n * kBytes, sum);
        for (; n < quads; ++n) some_quads<kSparse, kMode, 1>(control + 4 * n, weight + 4 * n, half, x + n * kBytes, sum);
    }

    // Adds one decoded group times kMany columns to out [columns][16].
    template <bool kSparse, Mode kMode>
    static __attribute__((noinline)) void block(const MatrixHeader* m, const Decoded& decoded, int g, const Quantized& q,
                                                int64_t b0, int64_t place_, float* out) {
        constexpr int kWeights = two_weights(kMode) ? 2 : 1, kPlanes = two_planes(kMode) ? 2 : 1;
        const auto* first = at<int32_t>(m, m->first_piece);
        const auto* pieces = at<Piece>(m, m->piece_list);
        const float* x_scale = q.scale + g * q.filled() + b0;
        alignas(64) int32_t too_much_of[kActivationGroup / kBlock][kMany];
        alignas(64) float less_activations_of[kActivationGroup / kBlock][kMany];
        if constexpr (as_codes(kSparse, kMode)) {
            int64_t at_block = place_ / kBlock;
            for (int p = first[g]; p < first[g + 1]; at_block += pieces[p++].blocks)
                for (int b = 0; b < kMany; ++b) {
                    too_much_of[p - first[g]][b] = too_much(m, q, at_block, pieces[p].blocks, b0 + b);
                    less_activations_of[p - first[g]][b] = -float(int32_t(activations(q, at_block, pieces[p].blocks, b0 + b)));
                }
        }
        for (int half = 0; half < kHalves; ++half) {
            int64_t start = q.offset(b0, place_);
            int step = 0;
            F part[kMany];
            for (int b = 0; b < kMany; ++b) part[b] = V::splat_float(0);
            for (int p = first[g]; p < first[g + 1]; ++p) {
                const int own_piece = p - first[g], quads = quads_of(pieces[p].blocks, kSparse);
                I sum[kWeights][kPlanes][kMany];
SLIMLM_UNROLL(2)
                for (int w = 0; w < kWeights; ++w)
                    for (int x = 0; x < kPlanes; ++x)
                        if (has_term(kMode, w, x))
                            sums<kSparse, kMode>(decoded.control + step, decoded.weight[w] + step, quads, half,
                                                 (x ? q.lower : q.upper) + start, sum[w][x]);
                const F scale = V::load_float(decoded.scale[own_piece] + half * kLanes);
SLIMLM_UNROLL(8)
                for (int b = 0; b < kMany; ++b) {
                    F value;
                    if constexpr (as_codes(kSparse, kMode)) {
                        I own[kWeights][kPlanes];
                        for (int w = 0; w < kWeights; ++w)
                            for (int x = 0; x < kPlanes; ++x) own[w][x] = sum[w][x][b];
                        value = joined_codes<kMode>(own, too_much_of[own_piece][b]);
                        if (m->zeros)
                            value = V::fma(V::load_float(decoded.zero[own_piece] + half * kLanes),
                                           V::splat_float(less_activations_of[own_piece][b]), value);
                    } else {
                        value = joined<kMode, 0>(sum[0][0][b], sum[0][kPlanes - 1][b],
                                                 V::load_ints(decoded.sums[0][own_piece] + half * kLanes));
                        if constexpr (kWeights == 2)
                            value = both_weights<kMode>(
                                value, joined<kMode, 1>(sum[1][0][b], sum[1][kPlanes - 1][b],
                                                        V::load_ints(decoded.sums[1][own_piece] + half * kLanes)));
                    }
                    part[b] = V::fma(value, scale, part[b]);
                }
                step += 4 * quads;
                start += int64_t(quads) * (kSparse ? 32 : 16) * kMany;
            }
SLIMLM_UNROLL(8)
            for (int b = 0; b < kMany; ++b) {
                float* to = out + b * kRows + half * kLanes;
                V::store(to, V::fma(part[b], V::splat_float(x_scale[b]), V::load_float(to)));
            }
        }
    }

    // Adds tiles [t0, t1) to out [tile][batch, filled up][16].
    template <bool kSparse, int kBits, Mode kMode>
    static void many(const MatrixHeader* m, int64_t t0, int64_t t1, const Quantized& q, float* out) {
        const Tables tables(m, kMode);
        const auto* first = at<int32_t>(m, m->first_piece);
        const auto* pieces = at<Piece>(m, m->piece_list);
        const int64_t filled = q.filled();
        static thread_local Scratch own;
        const int64_t size = (t1 - t0) * filled * kRows;
        float* total = own.get<float>(size);
        std::memset(total, 0, size_t(size) * sizeof(float));
        Decoded decoded;
        int64_t offset = 4 * kRows, place_ = 0;
        for (int g = 0; g < m->groups; ++g) {
            int64_t next = offset;
            for (int64_t t = t0; t < t1; ++t) {
                const uint8_t* tile = at<uint8_t>(m, m->data) + t * m->tile_bytes;
                next = decode<kSparse, kBits, kMode>(m, tables, g, tile + offset, decoded) - tile;
                for (int64_t b = 0; b < filled; b += kMany)
                    block<kSparse, kMode>(m, decoded, g, q, b, place_, total + ((t - t0) * filled + b) * kRows);
            }
            offset = next;
            for (int p = first[g]; p < first[g + 1]; ++p) place_ += pieces[p].blocks * kBlock;
        }
        for (int64_t t = t0; t < t1; ++t) {
            const auto* row = reinterpret_cast<const float*>(at<uint8_t>(m, m->data) + t * m->tile_bytes);
            for (int64_t b = 0; b < filled; ++b)
                for (int h = 0; h < kHalves; ++h) {
                    const int64_t i = ((t - t0) * filled + b) * kRows + h * kLanes;
                    const F scale = V::mul(V::load_float(row + h * kLanes), V::splat_float(unit(m, kMode)));
                    V::store(out + i, V::fma(V::load_float(total + i), scale, V::load_float(out + i)));
                }
        }
    }

    template <bool kSparse, int kBits, Mode kMode>
    static void coded_as(const MatrixHeader* m, int64_t t0, int64_t t1, const Quantized& q, float* out) {
        if (q.wide == kMany) return many<kSparse, kBits, kMode>(m, t0, t1, q, out);
        for (int64_t t = t0; t < t1; ++t, out += q.filled() * kRows) {
            if (q.wide == 1)
                few<kSparse, kBits, kMode, 1>(m, t, q, out);
            else
                few<kSparse, kBits, kMode, kFew>(m, t, q, out);
        }
    }

    template <bool kSparse, int kBits>
    static void coded_in(const MatrixHeader* m, int64_t t0, int64_t t1, const Quantized& q, float* out) {
        const bool precise = q.precise;
        if (m->bits > 4) return precise ? coded_as<kSparse, kBits, kWidePrecise>(m, t0, t1, q, out)
                                        : coded_as<kSparse, kBits, kWide>(m, t0, t1, q, out);
        if (m->codebook) return precise ? coded_as<kSparse, kBits, kTablePrecise>(m, t0, t1, q, out)
                                        : coded_as<kSparse, kBits, kTable>(m, t0, t1, q, out);
        return precise ? coded_as<kSparse, kBits, kEvenPrecise>(m, t0, t1, q, out)
                       : coded_as<kSparse, kBits, kEven>(m, t0, t1, q, out);
    }

    // Adds tiles [t0, t1) of a coded matrix to out [tile][batch, filled up][16].
    static void coded(const MatrixHeader* m, int64_t t0, int64_t t1, const Quantized& q, float* out) {
        const int bits = format_of(m->bits).first;
        if (m->sparse) {
            if (bits == 4) return coded_in<true, 4>(m, t0, t1, q, out);
            if (bits == 3) return coded_in<true, 3>(m, t0, t1, q, out);
            return coded_in<true, 2>(m, t0, t1, q, out);
        }
        if (bits == 4) return coded_in<false, 4>(m, t0, t1, q, out);
        if (bits == 3) return coded_in<false, 3>(m, t0, t1, q, out);
        return coded_in<false, 2>(m, t0, t1, q, out);
    }

    // Plain values

    template <int kType>
    static SLIMLM_INLINE F load_plain(const uint8_t* from, int64_t i) {
        if constexpr (kType == SLIMLM_F32) return V::load_float(reinterpret_cast<const float*>(from) + i);
        const auto* half = reinterpret_cast<const uint16_t*>(from) + i;
        if constexpr (kType == SLIMLM_F16) return V::load_half(half);
        return V::load_bfloat(half);
    }

    static float plain_at(const uint8_t* from, int type, int64_t i) {
        if (type == SLIMLM_F32) return reinterpret_cast<const float*>(from)[i];
        const uint16_t half = reinterpret_cast<const uint16_t*>(from)[i];
        return type == SLIMLM_F16 ? half_to_float(half) : bfloat_to_float(half);
    }

    // One row against kColumns columns x [columns][ld].
    template <int kType, int kColumns>
    static void plain_row(const uint8_t* row, int64_t count, const float* x, int64_t ld, float* out) {
        constexpr int kChains = kColumns == 1 ? 4 : 1;
        F sum[kColumns][kChains];
        for (int b = 0; b < kColumns; ++b)
            for (int c = 0; c < kChains; ++c) sum[b][c] = V::splat_float(0);
        int64_t i = 0;
        for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
            V::prefetch(row + (kType == SLIMLM_F32 ? 4 : 2) * i + 1024);
SLIMLM_UNROLL(4)
            for (int c = 0; c < kChains; ++c) {
                const F w = load_plain<kType>(row, i + c * kLanes);
SLIMLM_UNROLL(4)
                for (int b = 0; b < kColumns; ++b) sum[b][c] = V::fma(w, V::load_float(x + b * ld + i + c * kLanes), sum[b][c]);
            }
        }
        for (int b = 0; b < kColumns; ++b) {
            alignas(64) float lanes[kLanes];
            float total = 0;
            for (int c = 0; c < kChains; ++c) {
                V::store(lanes, sum[b][c]);
                for (int l = 0; l < kLanes; ++l) total += lanes[l];
            }
            for (int64_t k = i; k < count; ++k) total += plain_at(row, kType, k) * x[b * ld + k];
            out[b * kRows] += total;
        }
    }

    template <int kType>
    static void plain_as(const MatrixHeader* m, int64_t t0, int64_t t1, const float* x, int64_t ld, int64_t batch, int64_t filled,
                         float* out) {
        const int64_t row_bytes = int64_t(m->columns) * (kType == SLIMLM_F32 ? 4 : 2);
        for (int64_t t = t0; t < t1; ++t)
            for (int64_t row = t * kRows; row < std::min<int64_t>((t + 1) * kRows, m->rows); ++row) {
                const uint8_t* own = at<uint8_t>(m, m->data) + row * row_bytes;
                float* to = out + (t - t0) * filled * kRows + row % kRows;
                int64_t b = 0;
                for (; b + 4 <= batch; b += 4) plain_row<kType, 4>(own, m->columns, x + b * ld, ld, to + b * kRows);
                for (; b < batch; ++b) plain_row<kType, 1>(own, m->columns, x + b * ld, ld, to + b * kRows);
            }
    }

    // Adds row tiles [t0, t1) of a plain matrix times x [batch][ld] to out [tile][filled][16].
    static void plain(const MatrixHeader* m, int64_t t0, int64_t t1, const float* x, int64_t ld, int64_t batch, int64_t filled,
                      float* out) {
        if (m->type == SLIMLM_F32) return plain_as<SLIMLM_F32>(m, t0, t1, x, ld, batch, filled, out);
        if (m->type == SLIMLM_F16) return plain_as<SLIMLM_F16>(m, t0, t1, x, ld, batch, filled, out);
        plain_as<SLIMLM_BF16>(m, t0, t1, x, ld, batch, filled, out);
    }
};

// One call: the layers, and what their matrices share.

inline int64_t row_tiles(const MatrixHeader* m) { return (int64_t(m->rows) + kRows - 1) / kRows; }

template <class V>
struct Call {
    struct Input {  // one way in which the activations enter
        const MatrixHeader* matrix;
        Quantized quantized;
    };
    struct Adapter {
        const MatrixHeader *right, *left;
        int input;         // of the right factor; -1 where it is plain
        int64_t hidden;    // where its [batch][rank, filled up] begin
        int64_t ld;
    };
    struct Layer {
        Blob blob;
        const SlimlmProduct* asked;
        int input;  // of the base
        Adapter adapter[kMatrices / 2];
        int adapters;
        int64_t first_job;
    };

    std::vector<Layer> layers;
    std::vector<Input*> inputs;
    std::vector<Input*> spare;
    Scratch floats, hidden;

    int input_of(const MatrixHeader* m, size_t& used) {
        if (m->kind == kPlain) return -1;
        const bool own = m->map || m->input_scale;
        if (!own)
            for (size_t i = 0; i < used; ++i)
                if (!inputs[i]->matrix->map && !inputs[i]->matrix->input_scale &&
                    Quantized::wants_signed(inputs[i]->matrix) == Quantized::wants_signed(m))
                    return int(i);
        if (used == inputs.size()) inputs.push_back(new Input);
        inputs[used]->matrix = m;
        return int(used++);
    }

    ~Call() {
        for (Input* input : inputs) delete input;
    }

    int run(const SlimlmProduct* products, int32_t count, const void* x, int32_t type, int64_t batch, int64_t in, int32_t precision,
            int32_t threads) {
        layers.resize(size_t(count));
        size_t used = 0;
        int64_t work = 0;
        for (int n = 0; n < count; ++n) {
            Layer& layer = layers[size_t(n)];
            layer.asked = &products[n];
            const int error = open_blob(products[n].blob, products[n].blob_bytes, layer.blob);
            if (error) return error;
            if (layer.blob.in != in || !products[n].y) return SLIMLM_BAD_ARGUMENT;
            layer.input = input_of(layer.blob.matrix[0], used);
            layer.adapters = layer.blob.count / 2;
            for (int a = 0; a < layer.adapters; ++a) {
                layer.adapter[a].right = layer.blob.matrix[1 + 2 * a];
                layer.adapter[a].left = layer.blob.matrix[2 + 2 * a];
                layer.adapter[a].input = input_of(layer.adapter[a].right, used);
            }
            work += products[n].blob_bytes * std::min<int64_t>(batch, kBatchAtOnce);
        }
        if (work < 65536) threads = 1;
        const int64_t size = type == SLIMLM_F32 ? 4 : 2;
        for (int64_t b = 0; b < batch; b += kBatchAtOnce) {
            const int64_t now = std::min(kBatchAtOnce, batch - b);
            const auto* from = static_cast<const uint8_t*>(x) + b * in * size;
            chunk(from, type, b, now, in, precision == SLIMLM_PRECISE, threads, used);
        }
        return SLIMLM_OK;
    }

    const float* as_floats(const uint8_t* x, int type, int64_t count) {
        if (type == SLIMLM_F32) return reinterpret_cast<const float*>(x);
        float* to = floats.get<float>(count);
        const auto* from = reinterpret_cast<const uint16_t*>(x);
        if (type == SLIMLM_BF16)
            for (int64_t i = 0; i < count; ++i) to[i] = bfloat_to_float(from[i]);
        else
            for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
        return to;
    }

    void chunk(const uint8_t* raw, int type, int64_t b0, int64_t batch, int64_t in, bool precise, int threads, size_t used) {
        const float* x = as_floats(raw, type, batch * in);
        for (size_t i = 0; i < used; ++i) inputs[i]->quantized.prepare(batch, inputs[i]->matrix, precise);
        auto quantize = [&](int64_t job) {
            Input& own = *inputs[size_t(job / batch)];
            Kernel<V>::quantize(own.matrix, x + job % batch * in, job % batch, -1, own.quantized);
        };
        share(batch * in >= 32768 ? threads : 1, int64_t(used) * batch, quantize);
        right_factors(x, batch, in, threads);
        bases(x, type, b0, batch, in, precise, threads);
    }

    static int64_t filled_for(int64_t batch) {
        const int64_t wide = batch == 1 ? 1 : batch <= kFew ? kFew : kMany;
        return (batch + wide - 1) / wide * wide;
    }

    struct Range {
        int32_t layer, adapter;
        int64_t begin, end;
    };
    std::vector<Range> ranges;

    void split(int32_t layer, int32_t adapter, int64_t tiles, int64_t together) {
        for (int64_t t = 0; t < tiles; t += together) ranges.push_back({layer, adapter, t, std::min(tiles, t + together)});
    }

    void right_factors(const float* x, int64_t batch, int64_t in, int threads) {
        ranges.clear();
        int64_t end = 0;
        for (size_t n = 0; n < layers.size(); ++n)
            for (int a = 0; a < layers[n].adapters; ++a) {
                Adapter& own = layers[n].adapter[a];
                own.ld = row_tiles(own.right) * kRows;
                own.hidden = end;
                end += batch * own.ld;
                split(int32_t(n), a, row_tiles(own.right), threads > 1 && batch > 1 ? 2 : batch == 1 ? 2 : kTilesTogether);
            }
        if (ranges.empty()) return;
        float* to = hidden.get<float>(end);
        auto body = [&](int64_t job) {
            const Range& range = ranges[size_t(job)];
            const Adapter& own = layers[size_t(range.layer)].adapter[range.adapter];
            static thread_local Scratch scratch;
            const int64_t filled = filled_for(batch);
            float* out = scratch.get<float>((range.end - range.begin) * filled * kRows);
            std::memset(out, 0, size_t((range.end - range.begin) * filled * kRows) * sizeof(float));
            if (own.input < 0)
                Kernel<V>::plain(own.right, range.begin, range.end, x, in, batch, filled, out);
            else
                Kernel<V>::coded(own.right, range.begin, range.end, inputs[size_t(own.input)]->quantized, out);
            for (int64_t t = range.begin; t < range.end; ++t)
                for (int64_t b = 0; b < batch; ++b)
                    std::memcpy(to + own.hidden + b * own.ld + t * kRows, out + ((t - range.begin) * filled + b) * kRows,
                                kRows * sizeof(float));
        };
        share(threads, int64_t(ranges.size()), body);
    }

    void bases(const float* x, int type, int64_t b0, int64_t batch, int64_t in, bool precise, int threads) {
        ranges.clear();
        for (size_t n = 0; n < layers.size(); ++n) {
            const MatrixHeader* base = layers[n].blob.matrix[0];
            const int64_t tiles = row_tiles(base);
            // About eight jobs for a thread, and few enough tiles that their sums stay in the nearest cache.
            const int64_t fair = tiles / (8 * std::max(1, threads));
            split(int32_t(n), 0, tiles, std::max<int64_t>(1, std::min<int64_t>(fair, batch > kFew ? kTilesTogether : 16)));
        }
        auto body = [&](int64_t job) {
            const Range& range = ranges[size_t(job)];
            base_tiles(layers[size_t(range.layer)], range, x, type, b0, batch, in, precise);
        };
        share(threads, int64_t(ranges.size()), body);
    }

    void base_tiles(const Layer& layer, const Range& range, const float* x, int type, int64_t b0, int64_t batch, int64_t in,
                    bool precise) {
        static thread_local Scratch scratch;
        const int64_t filled = filled_for(batch), tiles = range.end - range.begin;
        float* out = scratch.get<float>(tiles * filled * kRows);
        std::memset(out, 0, size_t(tiles * filled * kRows) * sizeof(float));
        const MatrixHeader* base = layer.blob.matrix[0];
        if (layer.input < 0)
            Kernel<V>::plain(base, range.begin, range.end, x, in, batch, filled, out);
        else
            Kernel<V>::coded(base, range.begin, range.end, inputs[size_t(layer.input)]->quantized, out);
        for (int a = 0; a < layer.adapters; ++a) left_tiles(layer.adapter[a], range, batch, filled, precise, out);
        const float* bias = layer.asked->bias;
        for (int64_t t = range.begin; t < range.end; ++t) {
            const int64_t row = t * kRows, rows = std::min<int64_t>(kRows, base->rows - row);
            for (int64_t b = 0; b < batch; ++b) {
                const float* from = out + ((t - range.begin) * filled + b) * kRows;
                const int64_t to = (b0 + b) * base->rows + row;
                if (type == SLIMLM_F32) {
                    float* y = static_cast<float*>(layer.asked->y) + to;
                    for (int64_t i = 0; i < rows; ++i) y[i] = bias ? from[i] + bias[row + i] : from[i];
                } else {
                    uint16_t* y = static_cast<uint16_t*>(layer.asked->y) + to;
                    for (int64_t i = 0; i < rows; ++i) y[i] = float_to_bfloat(bias ? from[i] + bias[row + i] : from[i]);
                }
            }
        }
    }

    void left_tiles(const Adapter& own, const Range& range, int64_t batch, int64_t filled, bool precise, float* out) {
        const float* h = hidden.get<float>(0) + own.hidden;
        const MatrixHeader* left = own.left;
        if (left->kind == kPlain) return Kernel<V>::plain(left, range.begin, range.end, h, own.ld, batch, filled, out);
        static thread_local Quantized quantized;
        const auto* first = at<int32_t>(left, left->tile_of_row);
        const auto* tiles = at<Tile>(left, left->tile_list);
        int64_t t = first[range.begin];
        const int64_t end = first[range.end];
        while (t < end) {
            // Tiles of one group of outputs, each at the head of its sixteen rows, go together.
            int64_t next = t + 1;
            const bool straight = tiles[t].row % kRows == 0;
            while (straight && next < end && tiles[next].fold == tiles[t].fold && tiles[next].row == tiles[next - 1].row + kRows) ++next;
            const int fold = left->folds ? tiles[t].fold : -1;
            quantized.prepare(batch, left, precise);
            for (int64_t b = 0; b < batch; ++b) Kernel<V>::quantize(left, h + b * own.ld, b, fold, quantized);
            if (straight) {
                Kernel<V>::coded(left, t, next, quantized, out + (tiles[t].row / kRows - range.begin) * filled * kRows);
            } else {
                static thread_local Scratch scratch;
                float* apart = scratch.get<float>(filled * kRows);
                std::memset(apart, 0, size_t(filled * kRows) * sizeof(float));
                Kernel<V>::coded(left, t, next, quantized, apart);
                float* to = out + (tiles[t].row / kRows - range.begin) * filled * kRows + tiles[t].row % kRows;
                for (int64_t b = 0; b < batch; ++b)
                    for (int i = 0; i < tiles[t].count; ++i) to[b * kRows + i] += apart[b * kRows + i];
            }
            t = next;
        }
    }
};

template <class V>
int products(const SlimlmProduct* layers, int32_t count, const void* x, int32_t type, int64_t batch, int64_t in, int32_t precision,
             int32_t threads) {
    static thread_local Call<V> call;
    return call.run(layers, count, x, type, batch, in, precision, threads);
}

}  // namespace slimlm

#endif
