// Codes as a stream of bits and back (the law is slimlm/core/bits.py), and what a mask keeps.

#ifndef SLIMLM_STORING_H
#define SLIMLM_STORING_H

#include <cstdint>
#include <cstring>

namespace slimlm {
namespace {

// Eight codes, a byte each, as one number: pairs, fours and then all eight move together, until they fill `bits` bytes.
struct Steps {
    uint64_t low[3], high[3];
    int shift[3], count = 0;

    explicit Steps(int bits) {
        for (int lane = 16; lane <= 64 && bits < 8; lane *= 2, ++count) {
            const int filled = bits * lane / 16;
            low[count] = high[count] = 0;
            for (int start = 0; start < 64; start += lane) low[count] |= ((uint64_t(1) << filled) - 1) << start;
            high[count] = low[count] << filled;
            shift[count] = lane / 2 - filled;
        }
    }
    uint64_t together(uint64_t octet) const {
        for (int i = 0; i < count; ++i) octet = (octet & low[i]) | ((octet >> shift[i]) & high[i]);
        return octet;
    }
    uint64_t apart(uint64_t octet) const {
        for (int i = count - 1; i >= 0; --i) octet = (octet & low[i]) | ((octet & high[i]) << shift[i]);
        return octet;
    }
};

// One row of `count` codes to (count bits + 7) / 8 bytes.
void pack_row(const Steps& steps, int bits, const uint8_t* codes, int64_t count, uint8_t* packed) {
    const int64_t bytes = (count * bits + 7) / 8;
    int64_t i = 0;
    for (; 8 * i + 8 <= count && i * bits + 8 <= bytes; ++i) {
        uint64_t octet;
        std::memcpy(&octet, codes + 8 * i, 8);
        octet = steps.together(octet);
        std::memcpy(packed + i * bits, &octet, 8);
    }
    for (; 8 * i < count; ++i) {
        const int64_t left = count - 8 * i < 8 ? count - 8 * i : 8;
        uint64_t octet = 0;
        std::memcpy(&octet, codes + 8 * i, size_t(left));
        octet = steps.together(octet);
        std::memcpy(packed + i * bits, &octet, size_t((left * bits + 7) / 8));
    }
}

void unpack_row(const Steps& steps, int bits, const uint8_t* packed, int64_t count, uint8_t* codes) {
    const int64_t bytes = (count * bits + 7) / 8;
    int64_t i = 0;
    for (; 8 * i + 8 <= count && i * bits + 8 <= bytes; ++i) {
        uint64_t octet;
        std::memcpy(&octet, packed + i * bits, 8);
        octet = steps.apart(octet);
        std::memcpy(codes + 8 * i, &octet, 8);
    }
    for (; 8 * i < count; ++i) {
        const int64_t left = count - 8 * i < 8 ? count - 8 * i : 8;
        uint64_t octet = 0;
        std::memcpy(&octet, packed + i * bits, size_t((left * bits + 7) / 8));
        octet = steps.apart(octet);
        std::memcpy(codes + 8 * i, &octet, size_t(left));
    }
}

// The numbers of a row that a mask of bytes, 0 or 1, keeps, without gaps; `kept` of them.
template <class T>
void gather_row(const T* all, const uint8_t* mask, int64_t width, int64_t kept, T* some) {
    int64_t k = 0;
    for (int64_t i = 0; i < width && k < kept; ++i) {
        some[k] = all[i];
        k += mask[i];
    }
}

// The inverse: zero where the mask drops.
template <class T>
void scatter_row(const T* some, const uint8_t* mask, int64_t width, int64_t kept, T* all) {
    int64_t k = 0, i = 0;
    for (; i < width && k < kept; ++i) {
        all[i] = T(some[k] * mask[i]);  // not a branch, which would be mispredicted
        k += mask[i];
    }
    for (; i < width; ++i) all[i] = T(0);
}

}  // namespace
}  // namespace slimlm

#endif
