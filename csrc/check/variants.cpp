// Multiplies random layers of every format by each variant that runs here, and compares with plain sums over what
// `slimlm_unpack` says the layers stand for. For machines without Python and torch (csrc/check_arm.sh runs it under
// emulation); the full law is in tests/runtime/cpu/test_kernels.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../kernels.h"

namespace {

std::mt19937 random_bits(7);

int below(int n) { return int(random_bits() % unsigned(n)); }
float uniform() { return float(random_bits()) / 2147483648.f - 1; }

// A stored matrix of random bytes, with the memory that it points to.
struct Stored {
    SlimlmMatrix matrix{};
    std::vector<uint8_t> values, keep, zero;
    std::vector<uint16_t> scale, levels, input_scale;
    std::vector<float> wide_scale, plain;

    static uint16_t half() { return uint16_t(0x2400 + below(0x0c00)); }  // 2^-6 to 2^-3

    Stored(int rows, int columns, bool transposed, int bits, int group, bool table, bool sparse, bool float_scale, bool scaled) {
        matrix.rows = rows;
        matrix.columns = columns;
        matrix.transposed = transposed;
        matrix.bits = bits;
        if (bits == 0) {
            matrix.type = group;  // for plain values: their type
            const size_t count = size_t(rows) * size_t(columns);
            plain.resize(count);
            for (float& value : plain) value = uniform();
            scale.resize(count);
            for (uint16_t& value : scale) value = uint16_t(half() | below(2) << 15);
            matrix.values = group == SLIMLM_F32 ? static_cast<const void*>(plain.data()) : scale.data();
            matrix.values_bytes = int64_t(count) * (group == SLIMLM_F32 ? 4 : 2);
            return;
        }
        matrix.two_of_four = sparse;
        const int kept = sparse ? columns / 2 : columns;
        values.resize(size_t(rows) * size_t((kept * bits + 7) / 8));
        for (uint8_t& byte : values) byte = uint8_t(below(256));
        matrix.values = values.data();
        matrix.values_bytes = int64_t(values.size());
        if (sparse) {
            keep.assign(size_t(rows) * size_t((columns + 7) / 8), 0);
            for (int r = 0; r < rows; ++r)
                for (int c = 0; c < columns; c += 4) {
                    const int first = below(4), second = (first + 1 + below(3)) % 4;
                    for (int place : {c + first, c + second})
                        keep[size_t(r * ((columns + 7) / 8) + place / 8)] |= uint8_t(1 << place % 8);
                }
            matrix.keep = keep.data();
        }
        matrix.group = group;
        matrix.scale_rows = rows;
        matrix.scale_columns = group ? (columns + group - 1) / group : 1;
        const size_t scales = size_t(matrix.scale_rows * matrix.scale_columns);
        scale.resize(scales);
        for (uint16_t& s : scale) s = half();
        wide_scale.resize(scales);
        for (float& s : wide_scale) s = 0.02f + 0.01f * uniform();
        matrix.scale_type = float_scale ? SLIMLM_F32 : SLIMLM_F16;
        matrix.scale = float_scale ? static_cast<const void*>(wide_scale.data()) : scale.data();
        levels.resize(size_t(1) << bits);
        for (uint16_t& level : levels) level = uint16_t(half() | below(2) << 15);
        if (table) matrix.levels = levels.data();
        input_scale.resize(size_t(columns));
        for (uint16_t& s : input_scale) s = half();
        if (scaled) matrix.input_scale = input_scale.data();
    }

    void give_zeros() {
        zero.resize(size_t((matrix.scale_rows * matrix.scale_columns * matrix.bits + 7) / 8));
        for (uint8_t& byte : zero) byte = uint8_t(below(256));
        matrix.zero = zero.data();
    }
};

struct Layer {
    std::vector<std::unique_ptr<Stored>> stored;
    int out, in;
};

void fail(const char* what, int code) {
    std::printf("%s: error %d\n", what, code);
    std::exit(1);
}

// How far a product of `batch` rows is from the sums, as a share of their size.
double error_of(const Layer& layer, int batch, int precision) {
    std::vector<SlimlmMatrix> matrices;
    for (const auto& one : layer.stored) matrices.push_back(one->matrix);
    const int64_t bytes = slimlm_packed_bytes(matrices.data(), int32_t(matrices.size()));
    if (bytes < 0) fail("slimlm_packed_bytes", int(-bytes));
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(bytes))) std::abort();
    auto* blob = static_cast<uint8_t*>(memory);
    if (int code = slimlm_pack(matrices.data(), int32_t(matrices.size()), blob, bytes)) fail("slimlm_pack", code);
    if (int code = slimlm_verify(blob, bytes)) fail("slimlm_verify", code);

    const size_t out = size_t(layer.out), in = size_t(layer.in), rows = size_t(batch);
    std::vector<float> x(rows * in), bias(out), y(rows * out);
    for (float& value : x) value = uniform();
    for (float& value : bias) value = uniform();
    std::vector<double> expected(rows * out);
    for (size_t b = 0; b < rows; ++b)
        for (size_t o = 0; o < out; ++o) expected[b * out + o] = bias[o];
    // to [batch, n] += from [batch, m] times what a matrix stands for [n, m]
    auto add = [&](int index, const std::vector<double>& from, std::vector<double>& to) {
        const size_t n = to.size() / rows, m = from.size() / rows;
        std::vector<float> dense(n * m);
        if (int code = slimlm_unpack(blob, bytes, index, precision, dense.data())) fail("slimlm_unpack", code);
        for (size_t b = 0; b < rows; ++b)
            for (size_t i = 0; i < n; ++i)
                for (size_t k = 0; k < m; ++k) to[b * n + i] += from[b * m + k] * double(dense[i * m + k]);
    };
    const std::vector<double> exact(x.begin(), x.end());
    add(0, exact, expected);
    for (size_t a = 1; a < layer.stored.size(); a += 2) {
        std::vector<double> hidden(rows * size_t(layer.stored[a]->matrix.rows));
        add(int(a), exact, hidden);
        add(int(a) + 1, hidden, expected);
    }
    SlimlmProduct product{blob, bytes, bias.data(), y.data()};
    if (int code = slimlm_products(&product, 1, x.data(), SLIMLM_F32, batch, layer.in, precision, 2)) fail("slimlm_products", code);
    std::free(memory);
    double off = 0, size = 0;
    for (size_t i = 0; i < y.size(); ++i) {
        off += (y[i] - expected[i]) * (y[i] - expected[i]);
        size += expected[i] * expected[i];
    }
    return std::sqrt(off / size);
}

std::vector<Layer> layers() {
    std::vector<Layer> all;
    const int shapes[][2] = {{16, 128}, {50, 172}, {33, 288}};
    const int groups[] = {0, 32, 20, 96, 128};
    int turn = 0;
    for (const auto& shape : shapes)
        for (int table = 0; table < 2; ++table)
            for (int bits = 2; bits <= (table ? 4 : 8); ++bits)
                for (int sparse = 0; sparse < 2; ++sparse)
                    for (int group : groups) {
                        Layer layer{{}, shape[0], shape[1]};
                        const bool float_scale = ++turn % 3 == 0, scaled = turn % 5 == 0 && !table;
                        layer.stored.emplace_back(
                            new Stored(shape[0], shape[1], false, bits, group, table, sparse, float_scale, scaled));
                        if (turn % 2 && !table && !sparse) layer.stored.back()->give_zeros();
                        all.push_back(std::move(layer));
                    }
    for (int group : {0, 4, 20, 32, 128})
        for (int bits : {0, 4, 8})
            for (int rank : {6, 32}) {
                const int type = group == 0 ? SLIMLM_F32 : group == 4 ? SLIMLM_BF16 : SLIMLM_F16;
                Layer layer{{}, 50, 172};
                layer.stored.emplace_back(new Stored(50, 172, false, 4, 32, false, true, false, false));
                layer.stored.emplace_back(new Stored(rank, 172, false, bits, bits ? group : type, false, false, false, false));
                layer.stored.emplace_back(new Stored(rank, 50, true, bits, bits ? group : type, false, false, group == 20, false));
                all.push_back(std::move(layer));
            }
    for (int type : {SLIMLM_F32, SLIMLM_F16, SLIMLM_BF16}) {
        Layer layer{{}, 50, 173};
        layer.stored.emplace_back(new Stored(50, 173, false, 0, type, false, false, false, false));
        all.push_back(std::move(layer));
    }
    return all;
}

}  // namespace

int main() {
    const std::vector<Layer> all = layers();
    std::istringstream names(slimlm_variants());
    int wrong = 0;
    for (std::string name; names >> name;) {
        if (slimlm_use(name.c_str())) fail("slimlm_use", 1);
        double worst[2] = {0, 0};
        for (const Layer& layer : all)
            for (int batch : {1, 3, 13})
                for (int precision : {SLIMLM_FAST, SLIMLM_PRECISE}) {
                    const double error = error_of(layer, batch, precision);
                    if (!(error <= worst[precision])) worst[precision] = error;  // NaN stays
                }
        std::printf("%s: %zu layers, largest error %.2g precise, %.2g fast\n", name.c_str(), all.size(), worst[SLIMLM_PRECISE],
                    worst[SLIMLM_FAST]);
        wrong += !(worst[SLIMLM_PRECISE] < 1e-3 && worst[SLIMLM_FAST] < 3e-2);
    }
    return wrong ? 1 : 0;
}
