// A whole pass through the blocks of a Llama-like decoder: for each text some new tokens, whose keys and values join those
// kept of the tokens before. One token each is a decoding step, many are the prefill of a prompt. Between two products lie
// a few microseconds of arithmetic; a general library would take longer to call.

#ifndef SLIMLM_DECODER_H
#define SLIMLM_DECODER_H

#include <atomic>

#include "product.h"

namespace slimlm {

template <class V>
class Decoder {
public:
    static int run(const SlimlmDecoder& about, float* x, int64_t tokens, int64_t position, float* logits, int32_t precision,
                   int32_t threads) {
        static thread_local Decoder decoder;
        return decoder.pass(about, x, tokens, position, logits, precision, threads);
    }

private:
    using F = typename V::F;
    static constexpr int kLanes = V::kBytes / 4;
    static constexpr int kAtOnce = 128;
    // Queries of one key head that go through its keys and values together.
    static constexpr int kQueries = 4;

    // What a pass works with, besides its arguments.
    const SlimlmDecoder* about_ = nullptr;
    int64_t tokens_ = 0, position_ = 0, rows_ = 0, query_width_ = 0, key_width_ = 0;
    int32_t precision_ = 0, threads_ = 1;
    Scratch normed_, queries_, keys_, values_, mixed_, gate_, up_, out_;

    int pass(const SlimlmDecoder& about, float* x, int64_t tokens, int64_t position, float* logits, int32_t precision,
             int32_t threads) {
        about_ = &about;
        tokens_ = tokens;
        position_ = position;
        rows_ = about.batch * tokens;
        precision_ = precision;
        threads_ = threads;
        key_width_ = about.key_heads * about.dim;
        query_width_ = key_width_ * about.group;
        float* normed = normed_.get<float>(rows_ * about.width);
        float* out = out_.get<float>(rows_ * about.width);
        const float* added = nullptr;
        for (int64_t i = 0; i < about.count; ++i) {
            const SlimlmBlock& block = about.blocks[i];
            norm(x, added, block.attention_norm, rows_, about.width, normed);
            if (const int error = attention(block, normed, out)) return error;
            norm(x, out, block.mlp_norm, rows_, about.width, normed);
            if (const int error = mlp(block, normed, out)) return error;
            added = out;
        }
        if (added) add(x, added, rows_ * about.width);
        if (!logits) return SLIMLM_OK;
        // Of each text the last token.
        for (int64_t b = 0; b < about.batch; ++b) {
            const float* last = x + ((b + 1) * tokens - 1) * about.width;
            norm_row(last, about.last_norm, about.epsilon, about.width, normed + b * about.width);
        }
        SlimlmProduct head = about.head;
        head.y = logits;
        return multiply(&head, 1, normed, about.batch, about.width);
    }

    int multiply(SlimlmProduct* layers, int32_t count, const float* x, int64_t rows, int64_t width) {
        return products<V>(layers, count, x, SLIMLM_F32, rows, width, precision_, threads_);
    }

    int attention(const SlimlmBlock& block, const float* x, float* out) {
        float* queries = queries_.get<float>(rows_ * query_width_);
        float* keys = keys_.get<float>(rows_ * key_width_);
        float* values = values_.get<float>(rows_ * key_width_);
        float* mixed = mixed_.get<float>(rows_ * query_width_);
        SlimlmProduct layers[3] = {block.queries, block.keys, block.values};
        layers[0].y = queries;
        layers[1].y = keys;
        layers[2].y = values;
        if (const int error = multiply(layers, 3, x, rows_, about_->width)) return error;
        if (block.query_norm) norm(queries, nullptr, block.query_norm, rows_ * query_width_ / about_->dim, about_->dim, queries);
        if (block.key_norm) norm(keys, nullptr, block.key_norm, rows_ * key_width_ / about_->dim, about_->dim, keys);
        if (about_->cache_type == SLIMLM_F16) {
            if (!attend<uint16_t>(block, queries, keys, values, mixed)) return SLIMLM_BEYOND_HALF;
        } else {
            attend<float>(block, queries, keys, values, mixed);
        }
        SlimlmProduct last = block.attention_out;
        last.y = out;
        return multiply(&last, 1, mixed, rows_, query_width_);
    }

    int mlp(const SlimlmBlock& block, const float* x, float* out) {
        float* gate = gate_.get<float>(rows_ * about_->mlp);
        float* up = up_.get<float>(rows_ * about_->mlp);
        SlimlmProduct layers[2] = {block.gate, block.up};
        layers[0].y = gate;
        layers[1].y = up;
        if (const int error = multiply(layers, 2, x, rows_, about_->width)) return error;
        in_pieces(rows_ * about_->mlp, [&](int64_t begin, int64_t count) { swiglu(gate + begin, up + begin, count); });
        SlimlmProduct last = block.down;
        last.y = out;
        return multiply(&last, 1, gate, rows_, about_->mlp);
    }

    // body(begin, count) over all of `count` numbers, by several threads where there is work for them.
    template <class Body>
    void in_pieces(int64_t count, const Body& body) {
        constexpr int64_t kPiece = 16384;
        auto job = [&](int64_t i) { body(i * kPiece, std::min(kPiece, count - i * kPiece)); };
        share(threads_, (count + kPiece - 1) / kPiece, job);
    }

    // The caches hold float32 or float16.
    static SLIMLM_INLINE F load(const float* p) { return V::load_float(p); }
    static SLIMLM_INLINE F load(const uint16_t* p) { return V::load_half(p); }
    static SLIMLM_INLINE float number(float x) { return x; }
    static SLIMLM_INLINE float number(uint16_t x) { return half_to_float(x); }
    // Store the numbers of one head; whether the cache can hold them.
    static bool keep(const float* from, int64_t count, float* to) {
        std::memcpy(to, from, size_t(count) * sizeof(float));
        return true;
    }
    static bool keep(const float* from, int64_t count, uint16_t* to) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) V::store_half(to + i, V::load_float(from + i));
        for (; i < count; ++i) to[i] = float_to_half(from[i]);
        int32_t largest = 0;  // as bits: magnitudes of floats are ordered as integers, NaN above all
        for (int64_t j = 0; j < count; ++j) {
            int32_t bits;
            std::memcpy(&bits, from + j, sizeof bits);
            largest = std::max(largest, bits & 0x7fffffff);
        }
        // Below 65520, which rounds to infinity; and from 2^-16 on, where even the largest keeps the 8 bits of a fast activation.
        return largest < 0x477ff000 && (largest >= 0x37800000 || largest == 0);
    }

    template <class T>
    static float dot(const float* a, const T* b, int64_t count) {
        F total = V::splat_float(0);
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) total = V::fma(V::load_float(a + i), load(b + i), total);
        float rest = 0;
        for (; i < count; ++i) rest += a[i] * number(b[i]);
        return V::sum(total) + rest;
    }

    // x += y
    static void add(float* x, const float* y, int64_t count) {
        for (int64_t i = 0; i < count; ++i) x[i] += y[i];
    }

    // y = x / sqrt(mean(x^2) + epsilon) * weight; y may be x.
    static void norm_row(const float* x, const float* weight, float epsilon, int64_t width, float* y) {
        const float scale = 1.f / std::sqrt(dot(x, x, width) / float(width) + epsilon);
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] * scale * weight[i];
    }

    // x += added, where there is any; then y = the norm of each row of x.
    void norm(float* x, const float* added, const float* weight, int64_t rows, int64_t width, float* y) {
        const int64_t together = std::max<int64_t>(1, 16384 / width);
        auto job = [&](int64_t i) {
            for (int64_t r = i * together; r < std::min(rows, (i + 1) * together); ++r) {
                if (added) add(x + r * width, added + r * width, width);
                norm_row(x + r * width, weight, about_->epsilon, width, y + r * width);
            }
        };
        share(threads_, (rows + together - 1) / together, job);
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

    // gate = gate * sigmoid(gate) * up
    static void swiglu(float* gate, const float* up, int64_t count) {
        alignas(64) float tmp[kAtOnce];
        for (int64_t begin = 0; begin < count; begin += kAtOnce) {
            const int now = int(std::min<int64_t>(kAtOnce, count - begin));
            for (int i = 0; i < now; ++i) tmp[i] = gate[begin + i] > -87.f ? -gate[begin + i] : 87.f;
            exponentials(tmp, now);
            for (int i = 0; i < now; ++i) gate[begin + i] = gate[begin + i] / (1.f + tmp[i]) * up[begin + i];
        }
    }

    // x [dim] rotated by the angles of its position; `sine` carries the sign of each coordinate's partner.
    static void turn(const float* x, const float* cosine, const float* sine, int64_t dim, float* y) {
        const int64_t half = dim / 2;
        for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cosine[i] + x[i + half] * sine[i];
        for (int64_t i = half; i < dim; ++i) y[i] = x[i] * cosine[i] + x[i - half] * sine[i];
    }

    // The new tokens' keys, rotated, and values into the cache of T; then every query over what it sees. Whether T holds them.
    template <class T>
    bool attend(const SlimlmBlock& block, const float* queries, const float* keys, const float* values, float* mixed) {
        const SlimlmDecoder& d = *about_;
        const int64_t heads = d.batch * d.key_heads, per_head = tokens_ * d.group, sets = (per_head + kQueries - 1) / kQueries;
        // Below about ten microseconds of work another thread costs more than it brings.
        const int threads = heads * per_head * (position_ + tokens_) * d.dim < 65536 ? 1 : threads_;
        std::atomic<bool> held{true};
        auto store = [&](int64_t head) {
            static thread_local Scratch scratch;
            float* turned = scratch.get<float>(d.dim);
            for (int64_t t = 0; t < tokens_; ++t) {
                const int64_t from = ((head / d.key_heads * tokens_ + t) * d.key_heads + head % d.key_heads) * d.dim;
                const int64_t to = (head * d.length + position_ + t) * d.dim, angle = (position_ + t) * d.dim;
                turn(keys + from, d.key_cos + angle, d.key_sin + angle, d.dim, turned);
                const bool key = keep(turned, d.dim, static_cast<T*>(block.key_cache) + to);
                const bool value = keep(values + from, d.dim, static_cast<T*>(block.value_cache) + to);
                if (!key || !value) held.store(false, std::memory_order_relaxed);
            }
        };
        share(tokens_ > 1 ? threads : 1, heads, store);
        if (!held.load(std::memory_order_relaxed)) return false;
        auto look = [&](int64_t job) {
            const int64_t head = job / sets, first = job % sets * kQueries;
            const int64_t count = std::min<int64_t>(kQueries, per_head - first);
            if (count == kQueries) return set<kQueries, T>(block, queries, head, first, mixed);
            for (int64_t i = 0; i < count; ++i) set<1, T>(block, queries, head, first + i, mixed);
        };
        share(threads, heads * sets, look);
        return true;
    }

    // Queries `first` to `first` + kSet - 1 of a key head, counted token by token: each mixes the values that it sees by
    // softmax(queries keys^T). Earlier ones see less.
    template <int kSet, class T>
    void set(const SlimlmBlock& block, const float* queries, int64_t head, int64_t first, float* mixed) {
        const SlimlmDecoder& d = *about_;
        static thread_local Scratch scratch;
        const int64_t most = position_ + (first + kSet - 1) / d.group + 1, ld = (most + 15) / 16 * 16;
        float* score = scratch.get<float>(kSet * (ld + d.dim));
        float* query = score + kSet * ld;
        const T* keys = static_cast<const T*>(block.key_cache) + head * d.length * d.dim;
        const T* values = static_cast<const T*>(block.value_cache) + head * d.length * d.dim;
        int64_t seen[kSet], place[kSet];
        for (int q = 0; q < kSet; ++q) {
            const int64_t token = (first + q) / d.group, own = (first + q) % d.group;
            seen[q] = position_ + token + 1;
            place[q] = (head / d.key_heads * tokens_ + token) * query_width_ + (head % d.key_heads * d.group + own) * d.dim;
            const int64_t angle = (position_ + token) * d.dim;
            turn(queries + place[q], d.query_cos + angle, d.query_sin + angle, d.dim, query + q * d.dim);
        }
        scores<kSet>(query, keys, most, score, ld);
        float weight[kSet];
        for (int q = 0; q < kSet; ++q) {
            float* own = score + q * ld;
            float largest = -INFINITY, poison = 0, total = 0;
            for (int64_t p = 0; p < seen[q]; ++p) {
                largest = own[p] > largest ? own[p] : largest;
                poison += own[p] * 0.f;  // NaN where a score is NaN or infinite
            }
            for (int64_t p = 0; p < seen[q]; ++p) own[p] -= largest;
            exponentials(own, seen[q]);
            for (int64_t p = 0; p < seen[q]; ++p) total += own[p];
            weight[q] = 1.f / (total + poison);
        }
        // What all of them see together, and what each sees beyond.
        mix<kSet>(score, ld, values, 0, seen[0], mixed, place);
        for (int q = 1; q < kSet; ++q) {
            if (seen[q] > seen[0]) mix<1>(score + q * ld, ld, values, seen[0], seen[q], mixed, place + q);
        }
        for (int q = 0; q < kSet; ++q)
            for (int64_t i = 0; i < d.dim; ++i) mixed[place[q] + i] *= weight[q];
    }

    // score [kSet][ld] = query [kSet][dim] times keys [count][dim]
    template <int kSet, class T>
    void scores(const float* query, const T* keys, int64_t count, float* score, int64_t ld) {
        constexpr int kKeys = kSet == 1 ? 4 : 2;
        const int64_t dim = about_->dim;
        int64_t p = 0;
        for (; p + kKeys <= count; p += kKeys) {
            F sum[kSet][kKeys];
            for (int q = 0; q < kSet; ++q)
                for (int k = 0; k < kKeys; ++k) sum[q][k] = V::splat_float(0);
            int64_t i = 0;
            for (; i + kLanes <= dim; i += kLanes) {
                F key[kKeys];
SLIMLM_UNROLL(4)
                for (int k = 0; k < kKeys; ++k) key[k] = load(keys + (p + k) * dim + i);
SLIMLM_UNROLL(4)
                for (int q = 0; q < kSet; ++q) {
                    const F own = V::load_float(query + q * dim + i);
SLIMLM_UNROLL(4)
                    for (int k = 0; k < kKeys; ++k) sum[q][k] = V::fma(own, key[k], sum[q][k]);
                }
            }
            for (int q = 0; q < kSet; ++q)
                for (int k = 0; k < kKeys; ++k) {
                    float total = V::sum(sum[q][k]);
                    for (int64_t rest = i; rest < dim; ++rest) total += query[q * dim + rest] * number(keys[(p + k) * dim + rest]);
                    score[q * ld + p + k] = total;
                }
        }
        for (; p < count; ++p)
            for (int q = 0; q < kSet; ++q) score[q * ld + p] = dot(query + q * dim, keys + p * dim, dim);
    }

    // out[place[q]] [dim] = share [kSet][ld] times values [count][dim], positions begin to end; onto what is there unless at 0.
    template <int kSet, class T>
    void mix(const float* share, int64_t ld, const T* values, int64_t begin, int64_t end, float* out, const int64_t* place) {
        constexpr int kChunks = 2;
        const int64_t dim = about_->dim;
        int64_t i = 0;
        for (; i + kChunks * kLanes <= dim; i += kChunks * kLanes) {
            F sum[kSet][kChunks];
            for (int q = 0; q < kSet; ++q)
                for (int c = 0; c < kChunks; ++c)
                    sum[q][c] = begin ? V::load_float(out + place[q] + i + c * kLanes) : V::splat_float(0);
            for (int64_t p = begin; p < end; ++p) {
                F value[kChunks];
SLIMLM_UNROLL(4)
                for (int c = 0; c < kChunks; ++c) value[c] = load(values + p * dim + i + c * kLanes);
SLIMLM_UNROLL(4)
                for (int q = 0; q < kSet; ++q) {
                    const F own = V::splat_float(share[q * ld + p]);
SLIMLM_UNROLL(4)
                    for (int c = 0; c < kChunks; ++c) sum[q][c] = V::fma(own, value[c], sum[q][c]);
                }
            }
            for (int q = 0; q < kSet; ++q)
                for (int c = 0; c < kChunks; ++c) V::store(out + place[q] + i + c * kLanes, sum[q][c]);
        }
        for (; i < dim; ++i)
            for (int q = 0; q < kSet; ++q) {
                float total = begin ? out[place[q] + i] : 0;
                for (int64_t p = begin; p < end; ++p) total += share[q * ld + p] * number(values[p * dim + i]);
                out[place[q] + i] = total;
            }
    }
};

// What a variant offers.
struct Variant {
    const char* name;
    int (*products)(const SlimlmProduct*, int32_t, const void*, int32_t, int64_t, int64_t, int32_t, int32_t);
    int (*decode)(const SlimlmDecoder&, float*, int64_t, int64_t, float*, int32_t, int32_t);
};

template <class V>
constexpr Variant variant_of(const char* name) {
    return {name, products<V>, Decoder<V>::run};
}

extern const Variant avx512, avx2, neondot, neon, portable;

}  // namespace slimlm

#endif
