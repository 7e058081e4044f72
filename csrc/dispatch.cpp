// Which variant runs: the best that was built and that the processor can run, or the one asked for.

#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"
#include "decoder.h"
#include "loops.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace slimlm {

namespace {

struct Candidate {
    const Variant* variant;
    const Loops* loops;
    bool usable;
};

#if defined(__x86_64__)
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#if defined(SLIMLM_EMULATED)  // see emulated_avx512.h
bool has_avx512() { return has_avx2(); }
#else
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif
#elif defined(__aarch64__)
bool has_dot() {
#if defined(__APPLE__)
    return true;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#endif

// Best first.
const Candidate candidates[] = {
#if defined(__x86_64__)
#if !defined(SLIMLM_NO_AVX512)
    {&avx512, &loops_avx512, has_avx512()},
#endif
#if !defined(SLIMLM_NO_AVX2)
    {&avx2, &loops_avx2, has_avx2()},
#endif
#elif defined(__aarch64__)
#if !defined(SLIMLM_NO_NEONDOT)
    {&neondot, &loops_portable, has_dot()},
#endif
#if !defined(SLIMLM_NO_NEON)
    {&neon, &loops_portable, true},
#endif
#endif
    {&portable, &loops_portable, true},
};

std::string names(bool usable) {
    std::string all;
    for (const Candidate& c : candidates)
        if (c.usable == usable) all += (all.empty() ? "" : " ") + std::string(c.variant->name);
    return all;
}

const Candidate* best() {
    for (const Candidate& c : candidates)
        if (c.usable) return &c;
    return nullptr;
}

std::atomic<const Candidate*> active{best()};

const Variant& active_variant() { return *active.load()->variant; }

}  // namespace

const Loops& active_loops() { return *active.load()->loops; }

}  // namespace slimlm

using namespace slimlm;

extern "C" int slimlm_abi(void) { return SLIMLM_ABI; }

extern "C" const char* slimlm_variants(void) {
    static const std::string all = names(true);
    return all.c_str();
}

extern "C" const char* slimlm_unusable(void) {
    static const std::string all = names(false);
    return all.c_str();
}

extern "C" int slimlm_use(const char* variant) {
    for (const Candidate& c : candidates)
        if (c.usable && variant && !std::strcmp(c.variant->name, variant)) {
            active.store(&c);
            return SLIMLM_OK;
        }
    return SLIMLM_BAD_ARGUMENT;
}

extern "C" const char* slimlm_active(void) { return active_variant().name; }

extern "C" int slimlm_products(const SlimlmProduct* layers, int32_t count, const void* x, int32_t type, int64_t batch, int64_t in,
                               int32_t precision, int32_t threads) try {
    if (!layers || count < 1 || batch < 0 || in < 0) return SLIMLM_BAD_ARGUMENT;
    if (type != SLIMLM_F32 && type != SLIMLM_BF16) return SLIMLM_BAD_ARGUMENT;
    if (precision != SLIMLM_FAST && precision != SLIMLM_PRECISE) return SLIMLM_BAD_ARGUMENT;
    if (batch == 0) return SLIMLM_OK;
    if (!x) return SLIMLM_BAD_ARGUMENT;
    return active_variant().products(layers, count, x, type, batch, in, precision, threads < 1 ? 1 : threads);
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

// Whether a product is of this size.
static bool is_of(const SlimlmProduct& product, int64_t out, int64_t in) {
    Blob blob;
    return open_blob(product.blob, product.blob_bytes, blob) == SLIMLM_OK && blob.out == out && blob.in == in;
}

extern "C" int slimlm_decode(const SlimlmDecoder* d, float* x, int64_t tokens, int64_t position, float* logits, int32_t precision,
                             int32_t threads) try {
    if (!d || !x || tokens < 1 || position < 0 || d->batch < 1 || d->count < 0 || (d->count && !d->blocks)) return SLIMLM_BAD_ARGUMENT;
    if (d->width < 1 || d->mlp < 1 || d->key_heads < 1 || d->group < 1 || d->dim < 2 || d->dim % 2) return SLIMLM_BAD_ARGUMENT;
    if (tokens > d->length - position) return SLIMLM_BAD_ARGUMENT;
    if (d->cache_type != SLIMLM_F32 && d->cache_type != SLIMLM_F16) return SLIMLM_BAD_ARGUMENT;
    if (precision != SLIMLM_FAST && precision != SLIMLM_PRECISE) return SLIMLM_BAD_ARGUMENT;
    const int64_t keys = d->key_heads * d->dim, queries = keys * d->group;
    for (int64_t i = 0; i < d->count; ++i) {
        const SlimlmBlock& b = d->blocks[i];
        if (!is_of(b.queries, queries, d->width) || !is_of(b.keys, keys, d->width) || !is_of(b.values, keys, d->width) ||
            !is_of(b.attention_out, d->width, queries) || !is_of(b.gate, d->mlp, d->width) || !is_of(b.up, d->mlp, d->width) ||
            !is_of(b.down, d->width, d->mlp))
            return SLIMLM_WRONG_SIZE;
    }
    if (logits && !is_of(d->head, d->vocabulary, d->width)) return SLIMLM_WRONG_SIZE;
    return active_variant().decode(*d, x, tokens, position, logits, precision, threads < 1 ? 1 : threads);
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}
