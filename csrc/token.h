// What lies between the products of one token: RMS norm, SwiGLU, and one query against the keys and values seen so far.
// At batch 1 these are a few microseconds of arithmetic each, less than it costs to call a general library for them.

#ifndef SLIMLM_TOKEN_H
#define SLIMLM_TOKEN_H

#include "product.h"

namespace slimlm {

template <class V>
struct Token {
    using F = typename V::F;
    static constexpr int kLanes = V::kBytes / 4;
    static constexpr int kAtOnce = 128;

    static float sum(F a) {
        alignas(64) float lanes[kLanes];
        V::store(lanes, a);
        float total = 0;
        for (int i = 0; i < kLanes; ++i) total += lanes[i];
        return total;
    }

    static float dot(const float* a, const float* b, int64_t count) {
        F total = V::splat_float(0);
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) total = V::fma(V::load_float(a + i), V::load_float(b + i), total);
        float rest = 0;
        for (; i < count; ++i) rest += a[i] * b[i];
        return sum(total) + rest;
    }

    // e^x in place for x of at most 88, to about 1e-7 of itself; what is below -87 counts as -87, and so does NaN.
    static void exponentials(float* x, int64_t count) {
        constexpr float kMagic = 12582912.f;
        alignas(64) float whole[kAtOnce];
        alignas(64) int32_t power[kAtOnce];
        for (int64_t begin = 0; begin < count; begin += kAtOnce) {
            const int now = int(std::min<int64_t>(kAtOnce, count - begin));
            float* own = x + begin;
            for (int i = 0; i < now; ++i) {
                own[i] = (own[i] > -87.f ? own[i] : -87.f) * 1.44269504f;
                whole[i] = own[i] + kMagic;
            }
            std::memcpy(power, whole, size_t(now) * 4);
            for (int i = 0; i < now; ++i) {
                const float f = (own[i] - (whole[i] - kMagic)) * 0.693147181f;  // -0.35 to 0.35
                const float p = 1.f + f * (1.f + f * (0.5f + f * (0.16666667f + f * (0.041666667f + f * (0.0083333333f + f * 0.0013888889f)))));
                whole[i] = p;
                power[i] = int32_t((uint32_t(power[i]) - 0x4b400000u + 127u) << 23);
            }
            alignas(64) float factor[kAtOnce];
            std::memcpy(factor, power, size_t(now) * 4);
            for (int i = 0; i < now; ++i) own[i] = whole[i] * factor[i];
        }
    }

    static void norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* y) {
        for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
            const float scale = 1.f / std::sqrt(dot(x, x, width) / float(width) + epsilon);
            for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
        }
    }

    static void swiglu(const float* gate, const float* up, int64_t count, float* y) {
        alignas(64) float tmp[kAtOnce];
        for (int64_t begin = 0; begin < count; begin += kAtOnce) {
            const int now = int(std::min<int64_t>(kAtOnce, count - begin));
            for (int i = 0; i < now; ++i) tmp[i] = gate[begin + i] > -87.f ? -gate[begin + i] : 87.f;
            exponentials(tmp, now);
            for (int i = 0; i < now; ++i) y[begin + i] = gate[begin + i] / (1.f + tmp[i]) * up[begin + i];
        }
    }

    // x [dim] turned by the angles of its position; `sine` carries the sign of each coordinate's partner.
    static void turn(const float* x, const float* cosine, const float* sine, int64_t dim, float* y) {
        const int64_t half = dim / 2;
        for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cosine[i] + x[i + half] * sine[i];
        for (int64_t i = half; i < dim; ++i) y[i] = x[i] * cosine[i] + x[i - half] * sine[i];
    }

    // One key head of one text, and the queries that share it.
    static void head(const SlimlmAttention& a, int64_t index) {
        static thread_local Scratch scratch;
        const int64_t dim = a.dim, seen = a.position + 1;
        float* keys = a.key_cache + index * a.length * dim;
        float* values = a.value_cache + index * a.length * dim;
        turn(a.keys + index * dim, a.key_cos, a.key_sin, dim, keys + a.position * dim);
        std::memcpy(values + a.position * dim, a.values + index * dim, size_t(dim) * sizeof(float));
        float* query = scratch.get<float>(dim + seen);
        float* score = query + dim;
        for (int64_t g = 0; g < a.group; ++g) {
            const int64_t own = (index * a.group + g) * dim;
            turn(a.queries + own, a.query_cos, a.query_sin, dim, query);
            float largest = -INFINITY, poison = 0;
            for (int64_t p = 0; p < seen; ++p) {
                score[p] = dot(query, keys + p * dim, dim);
                largest = score[p] > largest ? score[p] : largest;
                poison += score[p] * 0.f;  // NaN where a score is NaN or infinite
            }
            for (int64_t p = 0; p < seen; ++p) score[p] -= largest;
            exponentials(score, seen);
            float total = poison;
            for (int64_t p = 0; p < seen; ++p) total += score[p];
            mix(score, values, seen, dim, 1.f / total, a.out + own);
        }
    }

    static void mix(const float* share, const float* values, int64_t seen, int64_t dim, float scale, float* out) {
        int64_t i = 0;
        for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
            F first = V::splat_float(0), second = V::splat_float(0);
            for (int64_t p = 0; p < seen; ++p) {
                const F s = V::splat_float(share[p]);
                first = V::fma(s, V::load_float(values + p * dim + i), first);
                second = V::fma(s, V::load_float(values + p * dim + i + kLanes), second);
            }
            V::store(out + i, V::mul(first, V::splat_float(scale)));
            V::store(out + i + kLanes, V::mul(second, V::splat_float(scale)));
        }
        for (; i < dim; ++i) {
            float total = 0;
            for (int64_t p = 0; p < seen; ++p) total += share[p] * values[p * dim + i];
            out[i] = total * scale;
        }
    }

    static void attend(const SlimlmAttention& a, int threads) {
        auto body = [&](int64_t job) { head(a, job); };
        const int64_t heads = a.batch * a.key_heads;
        // Below about ten microseconds of work another thread costs more than it brings.
        share(heads * a.group * (a.position + 1) * a.dim < 65536 ? 1 : threads, heads, body);
    }
};

// What a variant offers.
struct Variant {
    const char* name;
    int (*products)(const SlimlmProduct*, int32_t, const void*, int32_t, int64_t, int64_t, int32_t, int32_t);
    void (*norm)(const float*, const float*, float, int64_t, int64_t, float*);
    void (*swiglu)(const float*, const float*, int64_t, float*);
    void (*attend)(const SlimlmAttention&, int);
};

template <class V>
constexpr Variant variant_of(const char* name) {
    return {name, products<V>, Token<V>::norm, Token<V>::swiglu, Token<V>::attend};
}

extern const Variant avx512, avx2, neondot, neon, portable;

}  // namespace slimlm

#endif
