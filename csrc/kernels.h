// The C interface of slimlm's CPU kernels. Everything Python calls is declared here and, where compression calls it, in
// compression.h; no other symbol is exported.
//
// A layer y = x W^T + bias, with W a sum of a base and any number of low-rank parts, is one block of bytes ("blob") that
// `slimlm_pack` fills once, at load. It holds no pointers, so it can be written to a file and mapped again. Matrices are
// [out, in] in row order, activations [batch, in]. Functions return 0, or an SLIMLM_* code; nothing is ever allocated for the caller.

#ifndef SLIMLM_KERNELS_H
#define SLIMLM_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define SLIMLM_API __declspec(dllexport)
#else
#define SLIMLM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { SLIMLM_ABI = 6, SLIMLM_LAYOUT = 2 };

enum SlimlmError {
    SLIMLM_OK = 0,
    SLIMLM_BAD_ARGUMENT = 1,
    SLIMLM_BAD_BLOB = 2,          // not a blob, another layout, or cut short
    SLIMLM_NO_ZERO_LEVEL = 3,     // a codebook without zero under a mask other than 2:4
    SLIMLM_NOT_TWO_OF_FOUR = 4,   // a mask with more than two weights in four inputs
    SLIMLM_WRONG_SIZE = 5,        // stored tensors do not have the sizes that the shape asks for
    SLIMLM_NO_MEMORY = 6,
    SLIMLM_BEYOND_HALF = 7,       // a key or value that a float16 cache does not hold: too large, or a head's all too small
};

enum SlimlmType { SLIMLM_F32 = 0, SLIMLM_F16 = 1, SLIMLM_BF16 = 2 };

enum SlimlmPrecision {
    SLIMLM_FAST = 0,     // activations as 8-bit integers per 128 inputs, codebooks as 7-bit integers
    SLIMLM_PRECISE = 1,  // activations as 16-bit integers, codebooks as 12-bit integers
};

// One stored matrix, as in a checkpoint (docs/checkpoint-format.md).
typedef struct SlimlmMatrix {
    int64_t rows, columns;        // of the stored matrix; the left factor of a low-rank part is stored transposed
    int32_t transposed;           // 1: the matrix that multiplies is the transpose of the stored one
    int32_t bits;                 // 2 to 8, with a codebook 1 to 4; 0: plain values of `type`
    int32_t type;                 // SlimlmType of `values` where bits is 0
    int32_t two_of_four;          // 1: lay out as 2:4; 0: a mask, if any, becomes zero codes
    const void* values;           // codes, rows of packed bits; or plain values
    int64_t values_bytes;
    const uint8_t* keep;          // the mask, one bit per weight, rows start on bytes; NULL: no mask
    const void* scale;            // [scale_rows, scale_columns], NULL for plain values
    int32_t scale_type;           // SLIMLM_F16 or SLIMLM_F32
    int64_t scale_rows, scale_columns;
    int64_t group;                // inputs that share a scale; 0: the whole row or matrix
    const uint16_t* levels;       // the codebook, float16 [2^bits]; NULL: codes are numbers
    const uint16_t* input_scale;  // the channel scale, float16 [columns]; NULL: ones
    const uint8_t* zero;          // the code that stands for zero under each scale, in `bits` each, all in one stream of bits, for
                                  // codes that are numbers; not under `transposed` or `two_of_four`. NULL: 2^(bits-1)
} SlimlmMatrix;

SLIMLM_API int slimlm_abi(void);

// The variants that this library holds and this processor can run, best first, separated by spaces.
SLIMLM_API const char* slimlm_variants(void);
// The variants that were built but that this processor cannot run, likewise.
SLIMLM_API const char* slimlm_unusable(void);
// Use the variant of this name from now on; SLIMLM_BAD_ARGUMENT where there is none.
SLIMLM_API int slimlm_use(const char* variant);
SLIMLM_API const char* slimlm_active(void);

// Bytes of the blob of a layer: matrices[0] is the base, then right and left factor of each low-rank part in turn.
// Negative: minus an error code.
SLIMLM_API int64_t slimlm_packed_bytes(const SlimlmMatrix* matrices, int32_t count);
SLIMLM_API int slimlm_pack(const SlimlmMatrix* matrices, int32_t count, uint8_t* blob, int64_t bytes);
// What matrix `index` of a blob (counted as in `slimlm_pack`) stands for in products of this precision: float32, a left
// factor as [out, rank].
SLIMLM_API int slimlm_unpack(const uint8_t* blob, int64_t bytes, int32_t index, int32_t precision, float* dense);

// Whether a blob from a file is whole: sizes, layout and the sum over its headers and tables (not its weights). A blob that
// does not come straight from `slimlm_pack` must pass before anything else is done with it.
SLIMLM_API int slimlm_verify(const uint8_t* blob, int64_t bytes);

typedef struct SlimlmProduct {
    const uint8_t* blob;
    int64_t blob_bytes;
    const float* bias;  // [out] or NULL
    void* y;            // [batch, out], type as x
} SlimlmProduct;

// Several layers of one input x [batch, in] (q, k and v; gate and up): what they share is done once.
SLIMLM_API int slimlm_products(const SlimlmProduct* layers, int32_t count, const void* x, int32_t type, int64_t batch,
                               int64_t in, int32_t precision, int32_t threads);

// One block of a Llama-like decoder; `y` of its products is not used. Numbers are float32 where nothing else is said.
typedef struct SlimlmBlock {
    const float *attention_norm, *mlp_norm;         // [width], of the RMS norms
    const float *query_norm, *key_norm;             // [dim] or NULL
    SlimlmProduct queries, keys, values, attention_out, gate, up, down;
    void *key_cache, *value_cache;                  // [batch, key_heads, length, dim] of cache_type
} SlimlmBlock;

typedef struct SlimlmDecoder {
    const SlimlmBlock* blocks;
    const float* last_norm;                         // [width]
    SlimlmProduct head;
    const float *query_cos, *query_sin;             // [length, dim], times the attention's scale
    const float *key_cos, *key_sin;                 // [length, dim]; sines carry the sign of the other half in the rotation
    int64_t count, batch, width, mlp, key_heads, group, dim, length, vocabulary;  // `group`: queries per key head
    float epsilon;                                  // of every norm
    int32_t cache_type;                             // SLIMLM_F32 or SLIMLM_F16
} SlimlmDecoder;

// Takes `tokens` more tokens of each text through all blocks. x [batch, tokens, width] are their embeddings and become the
// hidden states after the last block; `position` tokens of each text are in the caches already, and these join them. logits
// [batch, vocabulary] are those after each text's last token; NULL where they are not needed. After SLIMLM_BEYOND_HALF x and what the
// caches hold from `position` on are lost; what they hold before it is not.
SLIMLM_API int slimlm_decode(const SlimlmDecoder* decoder, float* x, int64_t tokens, int64_t position, float* logits,
                             int32_t precision, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
