// Opening a blob: what `slimlm_pack` wrote is found again, and nothing that is cut short or of another layout is followed.

#ifndef SLIMLM_BLOB_H
#define SLIMLM_BLOB_H

#include <cstring>

#include "kernels.h"
#include "layout.h"

namespace slimlm {

constexpr int kMatrices = 17;  // a base and eight low-rank parts

struct Blob {
    const MatrixHeader* matrix[kMatrices];
    int count;
    int64_t out, in;
};

inline int64_t checksum(const BlobHeader& head, const uint8_t* blob) {
    uint64_t sum = 1469598103934665603u;
    auto add = [&sum](const void* data, size_t bytes) {
        const auto* p = static_cast<const uint8_t*>(data);
        for (size_t i = 0; i < bytes; ++i) sum = (sum ^ p[i]) * 1099511628211u;
    };
    BlobHeader bare = head;
    bare.checksum = 0;
    add(&bare, sizeof bare);
    const auto* offsets = reinterpret_cast<const int64_t*>(blob + sizeof(BlobHeader));
    for (int i = 0; i < head.matrices; ++i) {
        add(&offsets[i], 8);
        const auto* matrix = reinterpret_cast<const MatrixHeader*>(blob + offsets[i]);
        const bool sane = matrix->data >= int64_t(sizeof(MatrixHeader)) && matrix->data <= matrix->bytes;
        add(matrix, sane ? size_t(matrix->data) : sizeof(MatrixHeader));
    }
    return int64_t(sum & 0x7fffffffffffffff);
}

// Cheap: sizes and the magic word only. `slimlm_verify` checks the sum; only what passed it may be multiplied by.
inline int open_blob(const uint8_t* blob, int64_t bytes, Blob& opened) {
    if (!blob || bytes < int64_t(sizeof(BlobHeader)) || reinterpret_cast<uintptr_t>(blob) % 64) return SLIMLM_BAD_ARGUMENT;
    const auto* head = reinterpret_cast<const BlobHeader*>(blob);
    if (head->magic != kMagic || head->layout != SLIMLM_LAYOUT || head->bytes != bytes) return SLIMLM_BAD_BLOB;
    if (head->matrices < 1 || head->matrices > kMatrices) return SLIMLM_BAD_BLOB;
    const int64_t begin = int64_t(sizeof(BlobHeader)) + 8 * head->matrices;
    if (bytes < begin + int64_t(sizeof(MatrixHeader))) return SLIMLM_BAD_BLOB;
    const auto* offsets = reinterpret_cast<const int64_t*>(blob + sizeof(BlobHeader));
    for (int i = 0; i < head->matrices; ++i) {
        if (offsets[i] < begin || offsets[i] % 64 || offsets[i] > bytes - int64_t(sizeof(MatrixHeader))) return SLIMLM_BAD_BLOB;
        opened.matrix[i] = reinterpret_cast<const MatrixHeader*>(blob + offsets[i]);
        if (opened.matrix[i]->bytes > bytes - offsets[i]) return SLIMLM_BAD_BLOB;
    }
    opened.count = head->matrices;
    opened.out = head->out;
    opened.in = head->in;
    return SLIMLM_OK;
}

}  // namespace slimlm

#endif
