// How a blob lies in memory.
//
// blob    = BlobHeader, offsets of its matrices, then the matrices, each on a multiple of 64 bytes.
// coded   = MatrixHeader, tables, then tiles of 16 rows. A tile is 16 row multipliers (float32) and then, piece by piece,
//           the piece's 16 scales (where scales are per group) and its quads.
//           Where codes have zeros, 16 of them (float16, 2^(bits-1) subtracted) lie between the scales and the quads.
// piece   = consecutive inputs that share a scale and a group of 128 activations; a multiple of 32 inputs (a scale group
//           whose size is no multiple of 32 is filled up: `map` says which input is where).
// quad    = four steps; a step is 4 weights of each of 16 rows, 64 bytes when decoded: byte 4 * row + i.
//           Dense: a step covers 4 inputs, a quad 16. 2:4: a step covers 8 inputs (2 kept of each 4), a quad 32.
//   2:4 positions   64 bytes, step j at bits 2j
//   codes, 4 bits   2 x 64 bytes, steps 0 and 2 in the low nibbles, 1 and 3 in the high ones
//          2 bits   64 bytes, step j at bits 2j
//          3 bits   64 bytes as for 2 bits, then 32 bytes with the third bit: rows 0-7 at bit j, rows 8-15 at bit 4 + j
//          5 to 8   the upper bits (2, 2, 3 or 4 of them) as above, then the lower four as for 4 bits
// plain   = MatrixHeader, then the values in row order.
//
// Every weight is table[code], for a codebook and for codes that are numbers. A value is at most 63 in size, so that two
// products with activations of 8 bits fit 16 bits; values of 12 bits are two tables: 64 x upper + lower.

#ifndef SLIMLM_LAYOUT_H
#define SLIMLM_LAYOUT_H

#include <cstdint>

namespace slimlm {

constexpr int kRows = 16;
constexpr int kBlock = 32;
constexpr int kActivationGroup = 128;
constexpr uint32_t kMagic = 0x316d6c73;

enum Kind : int32_t { kPlain = 0, kCoded = 1 };
enum ScaleKind : int32_t { kRowScale = 0, kHalfPerPiece = 1, kFloatPerPiece = 2 };

struct BlobHeader {
    uint32_t magic;
    int32_t layout;
    int64_t bytes;
    int64_t out, in;
    int32_t matrices;
    int32_t unused;
    int64_t checksum;  // of all but the weights, so that a damaged cache is noticed before its tables are followed
};

struct Piece {
    int32_t blocks;  // of 32 inputs
    int32_t group;   // which scale of the row
};

struct Tile {
    int32_t row;    // the first
    int32_t count;  // at most 16; the rest are zeros
    int32_t fold;   // which row of `fold` multiplies the input
};

struct MatrixHeader {
    int32_t kind;
    int32_t type;     // plain: SlimlmType
    int32_t rows, columns;
    int32_t sparse;   // 2:4
    int32_t bits;     // as stored
    int32_t codebook;
    int32_t scale_kind;
    int32_t padded;   // inputs with filling; a multiple of 32
    int32_t groups;   // of activations
    int32_t pieces;
    int32_t tiles;
    int32_t folds;    // 0: no fold
    int32_t fold_type;
    int32_t zeros;    // whether each piece has zeros
    int32_t unused;
    float unit_fast, unit_precise;
    int8_t fast[16], upper[16], lower[16];
    int64_t tile_bytes;
    // Offsets from the matrix's header; 0: not there.
    int64_t map;          // int32 [padded], -1 for filling
    int64_t input_scale;  // float32 [columns]
    int64_t first_piece;  // int32 [groups + 1]
    int64_t piece_list;   // Piece [pieces]
    int64_t tile_list;    // Tile [tiles]
    int64_t tile_of_row;  // int32 [ceil(rows / 16) + 1], first tile of each 16 rows
    int64_t fold;         // fold_type [folds, columns]
    int64_t data;
    int64_t bytes;
};

// How the codes of one matrix are stored, from its bits.
struct CodeFormat {
    int planes;
    int first;  // bits of the first (or only) plane as stored: 2, 3 or 4
    int plane_bytes(int plane) const { return plane == 1 || first == 4 ? 128 : first == 3 ? 96 : 64; }
    int quad_bytes(bool sparse) const { return (sparse ? 64 : 0) + plane_bytes(0) + (planes == 2 ? 128 : 0); }
};

inline CodeFormat format_of(int bits) {
    if (bits <= 4) return {1, bits < 2 ? 2 : bits};  // codes of one bit are stored as if of two
    return {2, bits <= 6 ? 2 : bits - 4};
}

inline int quads_of(int blocks, bool sparse) { return sparse ? blocks : 2 * blocks; }

inline int scale_bytes(int kind) { return kind == kRowScale ? 0 : kind == kHalfPerPiece ? 2 * kRows : 4 * kRows; }

inline int zero_bytes(const MatrixHeader& m) { return m.zeros ? 2 * kRows : 0; }

template <class T>
const T* at(const MatrixHeader* m, int64_t offset) {
    return offset ? reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(m) + offset) : nullptr;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16;
    const uint32_t rest = uint32_t(h & 0x7fff) << 13;
    union { uint32_t u; float f; } value, magic;
    if ((h & 0x7c00) == 0x7c00) {
        value.u = sign | rest | 0x7f800000;
        return value.f;
    }
    magic.u = 0x77800000;  // 2^112: moves the exponent from float16's bias to float32's, denormals included
    value.u = rest;
    value.f *= magic.f;
    value.u |= sign;
    return value.f;
}

inline float bfloat_to_float(uint16_t h) {
    union { uint32_t u; float f; } value;
    value.u = uint32_t(h) << 16;
    return value.f;
}

// To the nearest, ties to even; too large becomes infinity.
inline uint16_t float_to_half(float f) {
    union { float f; uint32_t u; } value{f};
    const uint16_t sign = uint16_t(value.u >> 16 & 0x8000);
    const uint32_t size = value.u & 0x7fffffff;
    if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (size < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which adding a half rounds to
        union { uint32_t u; float f; } small{size};
        union { float f; uint32_t u; } rounded{small.f + 0.5f};
        return uint16_t(sign | (rounded.u - 0x3f000000));
    }
    return uint16_t(sign | ((size + 0xfff + (size >> 13 & 1)) >> 13) - 0x1c000);
}

inline uint16_t float_to_bfloat(float f) {
    union { float f; uint32_t u; } value{f};
    if ((value.u & 0x7fffffff) > 0x7f800000) return uint16_t(value.u >> 16 | 0x40);
    return uint16_t((value.u + 0x7fff + (value.u >> 16 & 1)) >> 16);
}

}  // namespace slimlm

#endif
