// Which variant runs: the best that was built and that the processor can run, or the one asked for.

#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"
#include "token.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace slimlm {

namespace {

struct Candidate {
    const Variant* variant;
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
    {&avx512, has_avx512()},
#endif
#if !defined(SLIMLM_NO_AVX2)
    {&avx2, has_avx2()},
#endif
#elif defined(__aarch64__)
#if !defined(SLIMLM_NO_NEONDOT)
    {&neondot, has_dot()},
#endif
#if !defined(SLIMLM_NO_NEON)
    {&neon, true},
#endif
#endif
    {&portable, true},
};

std::string names(bool usable) {
    std::string all;
    for (const Candidate& c : candidates)
        if (c.usable == usable) all += (all.empty() ? "" : " ") + std::string(c.variant->name);
    return all;
}

const Variant* best() {
    for (const Candidate& c : candidates)
        if (c.usable) return c.variant;
    return nullptr;
}

std::atomic<const Variant*> active{best()};

}  // namespace
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
            active.store(c.variant);
            return SLIMLM_OK;
        }
    return SLIMLM_BAD_ARGUMENT;
}

extern "C" const char* slimlm_active(void) { return active.load()->name; }

extern "C" int slimlm_products(const SlimlmProduct* layers, int32_t count, const void* x, int32_t type, int64_t batch, int64_t in,
                               int32_t precision, int32_t threads) try {
    if (!layers || count < 1 || batch < 0 || in < 0) return SLIMLM_BAD_ARGUMENT;
    if (type != SLIMLM_F32 && type != SLIMLM_BF16) return SLIMLM_BAD_ARGUMENT;
    if (precision != SLIMLM_FAST && precision != SLIMLM_PRECISE) return SLIMLM_BAD_ARGUMENT;
    if (batch == 0) return SLIMLM_OK;
    if (!x) return SLIMLM_BAD_ARGUMENT;
    return active.load()->products(layers, count, x, type, batch, in, precision, threads < 1 ? 1 : threads);
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* y) {
    if (rows < 0 || width < 1 || !x || !weight || !y) return SLIMLM_BAD_ARGUMENT;
    active.load()->norm(x, weight, epsilon, rows, width, y);
    return SLIMLM_OK;
}

extern "C" int slimlm_swiglu(const float* gate, const float* up, int64_t count, float* y) {
    if (count < 0 || !gate || !up || !y) return SLIMLM_BAD_ARGUMENT;
    active.load()->swiglu(gate, up, count, y);
    return SLIMLM_OK;
}

extern "C" int slimlm_attend(const SlimlmAttention* a, int32_t threads) try {
    if (!a || a->batch < 1 || a->key_heads < 1 || a->group < 1 || a->dim < 2 || a->dim % 2) return SLIMLM_BAD_ARGUMENT;
    if (a->position < 0 || a->position >= a->length) return SLIMLM_BAD_ARGUMENT;
    active.load()->attend(*a, threads < 1 ? 1 : threads);
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}
