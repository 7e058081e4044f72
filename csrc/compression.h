// The C interface of what compression computes on the CPU besides torch's products: loops over weights that torch would make
// in many passes. Functions return 0 or an SLIMLM_* code of kernels.h, allocate nothing for the caller, and give the same
// bytes for any number of threads. Matrices are in row order and float32 where nothing else is said.

#ifndef SLIMLM_COMPRESSION_H
#define SLIMLM_COMPRESSION_H

#include "kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    SLIMLM_MOST_INPUTS = 128,  // of a piece of a sweep or descent
    SLIMLM_MOST_OF_UNIT = 16,  // m of n:m
};

// codes [rows, width] of weight [rows, width]: the nearest whole numbers to weight / scale, ties to even, from -2^(bits-1) to
// 2^(bits-1) - 1; 0 under a scale of zero. scale is [scale_rows, ceil(width / group)], scale_rows 1 or rows.
SLIMLM_API int slimlm_encode(const float* weight, int64_t rows, int64_t width, const float* scale, int64_t scale_rows,
                             int64_t group, int32_t bits, int8_t* codes, int32_t threads);

// The values that codes stand for, in units of a scale.
typedef struct SlimlmGrid {
    const float* values;  // [count], ascending, the last above zero
    int32_t count;        // 2 to 256; of a codebook at most 16
    int32_t even;         // 1: consecutive whole numbers; 0: a codebook
} SlimlmGrid;

// Sets of numbers, each of which shares a scale, and by what their squared errors are multiplied, in any order in memory.
typedef struct SlimlmSets {
    const float *points, *weights;
    int64_t sets, size;
    int64_t points_per_set, points_per_point;    // how far apart the first points of two sets are, and two points of a set
    int64_t weights_per_set, weights_per_point;  // the same of weights; 0 where they share one
} SlimlmSets;

// scales [sets]: of least weighted squared error; 0 for a set of zeros. `coarse` candidates in the first scan, at least 2; with
// `either_sign` as many negative ones.
SLIMLM_API int slimlm_best_scale(const SlimlmSets* sets, const SlimlmGrid* grid, int32_t coarse, int32_t either_sign, float* scales,
                                 int32_t threads);
// scales [sets]: likewise, near those of start [sets]; 0 where that is 0.
SLIMLM_API int slimlm_nearby_scale(const SlimlmSets* sets, const SlimlmGrid* grid, const float* start, float* scales,
                                   int32_t threads);

// Scales and zeros [sets], whole numbers from 0 to 2^bits - 1: of least weighted squared error, where a number x stands for
// (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) x scale. Both are 0 for a set whose points
// are zero where their weights are not.
SLIMLM_API int slimlm_affine_scale(const SlimlmSets* sets, int32_t bits, int32_t coarse, float* scales, float* zeros,
                                   int32_t threads);
// scales [sets]: those given, or those of least squares for the codes that these give, where they err less. points [sets, size];
// weights likewise or NULL: ones.
SLIMLM_API int slimlm_least_squares_scale(const float* points, const float* weights, int64_t sets, int64_t size, int32_t bits,
                                          const float* given, float* scales, int32_t threads);
// totals [bins]: the sums of the weights (NULL: ones) of numbers [count] in bins of `width` from `low` on; what lies beyond joins
// the outermost.
SLIMLM_API int slimlm_histogram(const float* numbers, const float* weights, int64_t count, float low, float width, int32_t bins,
                                double* totals, int32_t threads);

// How the weights of an input are rounded. A number x stands for the nearest of the grid's values x scale; 0 under a scale of zero.
typedef struct SlimlmRounding {
    const float *scale, *zero;      // of the inputs' outputs; scale NULL: no rounding; zero NULL: 2^(bits-1)
    int64_t per_input, per_output;  // how far apart the scales (and zeros) of two inputs of a piece are, and of two outputs
    const float* codebook;          // [2^bits], ascending; NULL: whole numbers, index - zero
    int32_t bits;                   // 1 to 8; with a codebook to 4
} SlimlmRounding;

// The column sweep of a weight. Matrices are [in, out].
typedef struct SlimlmSweep {
    float* remaining;      // the weights, updated for the errors of earlier inputs
    float *value, *error;  // what was decided, and (remaining - value) / the diagonal of `upper`
    const float* upper;    // [in, in]: the upper triangular factor of the inverse covariance
    uint8_t* mask;         // 1 or 0; NULL: all stay
    uint8_t* index;        // NULL where nothing is rounded
    int64_t in, out;
    int32_t of, kept;      // n:m: the mask is chosen, `kept` of `of` inputs; of = 0: the mask is given
    SlimlmRounding rounding;
} SlimlmSweep;

// Decides the inputs from low up to high, at most SLIMLM_MOST_INPUTS, and updates `remaining` of these alone. Under n:m they begin
// and end with a unit of `of` inputs.
SLIMLM_API int slimlm_sweep(const SlimlmSweep* sweep, int64_t low, int64_t high, int32_t threads);
// Chooses the mask of the units from low up to high, as their weights are now.
SLIMLM_API int slimlm_choose(const SlimlmSweep* sweep, int64_t low, int64_t high, int32_t threads);

// Coordinate descent on tr((W - B) H (W - B)^T). Matrices are [in, out].
typedef struct SlimlmDescent {
    float* gradient;          // H (W - B)^T, exact for the inputs that are decided
    float *value, *change;    // B^T, and the sum of its changes
    uint8_t *index, *mask;    // mask NULL: all stay
    const float* covariance;  // H [in, in]
    int64_t in, out;
    // n:m: mask and codes of `of` inputs are decided together; of = 0: codes alone, input by input.
    int32_t of, kept, masks;
    const int32_t* places;    // [masks, kept]: the places in a unit that stay
    // [in / of, masks, kept, kept]: H among those that stay, its inverse, and the upper triangular factor of that.
    const float *among, *inverse, *upper;
    SlimlmRounding rounding;
} SlimlmDescent;

// Decides the inputs from low up to high, at most SLIMLM_MOST_INPUTS, and updates the gradient of these alone.
SLIMLM_API int slimlm_descend(const SlimlmDescent* descent, int64_t low, int64_t high, int32_t threads);

// Coordinate descent on the right factor R of L R, by tr((E - L R) H (E - L R)^T). Matrices are [in, rank].
typedef struct SlimlmRightDescent {
    float* gradient;       // H (E - L R)^T L, exact for the inputs that are decided
    float* along;          // [high - low, rank]: the changes of the inputs that are decided, times L^T L
    const float *value, *scale;     // R^T, and the scale of each number
    uint8_t* index;        // codes + 2^(bits-1)
    const float* covariance;        // H [in, in]
    const float *inner, *inverse;   // L^T L [rank, rank] and its inverse
    int64_t in, rank;
    int32_t bits;
} SlimlmRightDescent;

// Decides the inputs from low up to high one after another, all components of one together, and updates the gradient of these alone.
SLIMLM_API int slimlm_descend_right(const SlimlmRightDescent* descent, int64_t low, int64_t high);

// Codes, a byte each, [rows, count] as a stream of bits, least significant first: [rows, (count x bits + 7) / 8]; and back.
SLIMLM_API int slimlm_pack_codes(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint8_t* packed, int32_t threads);
SLIMLM_API int slimlm_unpack_codes(const uint8_t* packed, int64_t rows, int64_t count, int32_t bits, uint8_t* codes,
                                   int32_t threads);
// Numbers of `size` bytes (1, 2 or 4) [rows, width] that a mask of bytes, 0 or 1, keeps, `kept` in each row: [rows, kept]; and back
// to their places, with zeros where the mask drops.
SLIMLM_API int slimlm_gather(const void* all, const uint8_t* mask, int64_t rows, int64_t width, int64_t kept, int32_t size, void* some,
                           int32_t threads);
SLIMLM_API int slimlm_scatter(const void* some, const uint8_t* mask, int64_t rows, int64_t width, int64_t kept, int32_t size, void* all,
                            int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
