// The C interface of what compression computes on the CPU besides torch's products: loops over weights that torch would make
// in many passes. Functions return 0 or an SLIMLM_* code of kernels.h, allocate nothing for the caller, and give the same
// bytes for any number of threads. Matrices are in row order and float32 where nothing else is said.

#ifndef SLIMLM_COMPRESSION_H
#define SLIMLM_COMPRESSION_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// codes [rows, width] of weight [rows, width]: the nearest whole numbers to weight / scale, ties to even, from -2^(bits-1) to
// 2^(bits-1) - 1; 0 under a scale of zero. scale is [scale_rows, ceil(width / group)], scale_rows 1 or rows.
SLIMLM_API int slimlm_encode(const float* weight, int64_t rows, int64_t width, const float* scale, int64_t scale_rows,
                             int64_t group, int32_t bits, int8_t* codes, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
