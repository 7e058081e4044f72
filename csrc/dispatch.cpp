// Which variant runs: the best that was built and that the processor can run, or the one asked for.

#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"
#include "product.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace slimlm {

#define SLIMLM_VARIANT(name)                                                                                                   \
    int products_##name(const SlimlmProduct*, int32_t, const void*, int32_t, int64_t, int64_t, int32_t, int32_t)
SLIMLM_VARIANT(portable);
SLIMLM_VARIANT(avx2);
SLIMLM_VARIANT(avx512);
SLIMLM_VARIANT(neon);
SLIMLM_VARIANT(neondot);
#undef SLIMLM_VARIANT

namespace {

struct Variant {
    const char* name;
    Products run;
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
const Variant variants[] = {
#if defined(__x86_64__)
#if !defined(SLIMLM_NO_AVX512)
    {"avx512", products_avx512, has_avx512()},
#endif
#if !defined(SLIMLM_NO_AVX2)
    {"avx2", products_avx2, has_avx2()},
#endif
#elif defined(__aarch64__)
#if !defined(SLIMLM_NO_NEONDOT)
    {"neondot", products_neondot, has_dot()},
#endif
#if !defined(SLIMLM_NO_NEON)
    {"neon", products_neon, true},
#endif
#endif
    {"portable", products_portable, true},
};

std::string names(bool usable) {
    std::string all;
    for (const Variant& v : variants)
        if (v.usable == usable) all += (all.empty() ? "" : " ") + std::string(v.name);
    return all;
}

const Variant* best() {
    for (const Variant& v : variants)
        if (v.usable) return &v;
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
    for (const Variant& v : variants)
        if (v.usable && variant && !std::strcmp(v.name, variant)) {
            active.store(&v);
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
    return active.load()->run(layers, count, x, type, batch, in, precision, threads < 1 ? 1 : threads);
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}
