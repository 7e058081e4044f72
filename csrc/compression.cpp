// The functions that compression calls: arguments are checked, and the work is shared among threads.

#include "compression.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "loops.h"
#include "pool.h"
#include "storing.h"

using namespace slimlm;

namespace {

// Weights of one job: enough that claiming it costs nothing beside it, few enough that threads end together.
constexpr int64_t kWeightsOfJob = 1 << 14;

int at_least_one(int32_t threads) { return threads < 1 ? 1 : threads; }

// Sets of one job: a multiple of the lanes of every vector, so that the sets of a vector are the same for any number of threads.
constexpr int64_t kSetsOfJob = 32;

bool valid(const SlimlmSets& sets) {
    return sets.sets >= 0 && sets.size >= 1 && ((sets.points && sets.weights) || sets.sets == 0);
}

bool valid(const SlimlmGrid& grid) {
    return grid.values && grid.count >= 2 && grid.count <= (grid.even ? 256 : 16) && grid.values[grid.count - 1] > 0;
}

// body(first, last) over the sets.
template <class F>
void share_sets(int32_t threads, const SlimlmSets& sets, F body) {
    const int64_t each = sets.size > kSmallSet ? 1 : kSetsOfJob;
    auto job = [&](int64_t i) { body(i * each, std::min(sets.sets, (i + 1) * each)); };
    share(at_least_one(threads), (sets.sets + each - 1) / each, job);
}

// body(first, last) over pieces of 0 .. count, `size` weights in each of the count.
template <class F>
void share_rows(int32_t threads, int64_t count, int64_t size, F body) {
    const int64_t rows = std::max<int64_t>(1, kWeightsOfJob / std::max<int64_t>(1, size));
    auto job = [&](int64_t i) { body(i * rows, std::min(count, (i + 1) * rows)); };
    share(at_least_one(threads), (count + rows - 1) / rows, job);
}

}  // namespace

extern "C" int slimlm_encode(const float* weight, int64_t rows, int64_t width, const float* scale, int64_t scale_rows,
                             int64_t group, int32_t bits, int8_t* codes, int32_t threads) try {
    if (rows < 0 || width < 0 || group < 1 || bits < 2 || bits > 8 || (scale_rows != 1 && scale_rows != rows)) return SLIMLM_BAD_ARGUMENT;
    if (rows == 0 || width == 0) return SLIMLM_OK;
    if (!weight || !scale || !codes) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    const int64_t groups = (width + group - 1) / group;
    const float largest = float((1 << (bits - 1)) - 1), smallest = -largest - 1;
    share_rows(threads, rows, width, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t at = row * width + g * group, count = std::min(group, width - g * group);
                const float own = scale[(scale_rows == 1 ? 0 : row) * groups + g];
                if (own == 0)
                    std::memset(codes + at, 0, size_t(count));
                else
                    loops.encode(weight + at, count, own, smallest, largest, codes + at);
            }
    });
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_best_scale(const SlimlmSets* sets, const SlimlmGrid* grid, int32_t coarse, int32_t either_sign, float* scales,
                                 int32_t threads) try {
    if (!sets || !grid || !valid(*sets) || !valid(*grid) || coarse < 2 || (!scales && sets->sets)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    share_sets(threads, *sets, [&](int64_t first, int64_t last) {
        loops.best_scale(*sets, *grid, coarse, either_sign != 0, first, last, scales);
    });
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_nearby_scale(const SlimlmSets* sets, const SlimlmGrid* grid, const float* start, float* scales,
                                   int32_t threads) try {
    if (!sets || !grid || !valid(*sets) || !valid(*grid) || ((!scales || !start) && sets->sets)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    share_sets(threads, *sets, [&](int64_t first, int64_t last) {
        loops.nearby_scale(*sets, *grid, start, first, last, scales);
    });
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_affine_scale(const SlimlmSets* sets, int32_t bits, int32_t coarse, float* scales, float* zeros,
                                   int32_t threads) try {
    if (!sets || !valid(*sets) || bits < 1 || bits > 8 || coarse < 2 || ((!scales || !zeros) && sets->sets)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    share_sets(threads, *sets, [&](int64_t first, int64_t last) { loops.affine_scale(*sets, bits, coarse, first, last, scales, zeros); });
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

namespace {

// Sets in pieces, so that the threads share a large set, too. The pieces are the same for any number of threads.
struct Pieces {
    const float *points, *weights;
    int64_t sets, size;
    int64_t of_set() const { return (size + kWeightsOfJob - 1) / kWeightsOfJob; }

    // body(piece, set, points, weights, count)
    template <class F>
    void share(int32_t threads, F body) const {
        const int64_t each = of_set();
        share_rows(threads, sets * each, std::min(size, kWeightsOfJob), [&](int64_t first, int64_t last) {
            for (int64_t piece = first; piece < last; ++piece) {
                const int64_t set = piece / each, begin = piece % each * kWeightsOfJob, at = set * size + begin;
                body(piece, set, points + at, weights ? weights + at : nullptr, std::min(kWeightsOfJob, size - begin));
            }
        });
    }
};

}  // namespace

extern "C" int slimlm_least_squares_scale(const float* points, const float* weights, int64_t sets, int64_t size, int32_t bits,
                                          const float* given, float* scales, int32_t threads) try {
    if (sets < 0 || size < 1 || bits < 2 || bits > 8) return SLIMLM_BAD_ARGUMENT;
    if (sets == 0) return SLIMLM_OK;
    if (!points || !given || !scales) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    const float largest = float((1 << (bits - 1)) - 1), smallest = -largest - 1;
    const Pieces pieces{points, weights, sets, size};
    const int64_t each = pieces.of_set();
    std::vector<double> sums(size_t(2 * sets * each));
    const auto safe = [&](int64_t set) { return given[set] == 0 ? 1.f : given[set]; };
    pieces.share(threads, [&](int64_t piece, int64_t set, const float* p, const float* w, int64_t count) {
        loops.code_sums(p, w, count, safe(set), smallest, largest, &sums[size_t(2 * piece)]);
    });
    std::vector<float> fitted(static_cast<size_t>(sets));
    for (int64_t set = 0; set < sets; ++set) {
        double along = 0, square = 0;
        for (int64_t piece = set * each; piece < (set + 1) * each; ++piece) {
            along += sums[size_t(2 * piece)];
            square += sums[size_t(2 * piece + 1)];
        }
        const float scale = float(double(safe(set)) + along / square);
        fitted[size_t(set)] = scale > 0 ? scale : safe(set);  // NaN, where all codes are zero, is not
    }
    pieces.share(threads, [&](int64_t piece, int64_t set, const float* p, const float* w, int64_t count) {
        sums[size_t(2 * piece)] = loops.code_error(p, w, count, safe(set), smallest, largest);
        sums[size_t(2 * piece + 1)] = loops.code_error(p, w, count, fitted[size_t(set)], smallest, largest);
    });
    for (int64_t set = 0; set < sets; ++set) {
        double before = 0, after = 0;
        for (int64_t piece = set * each; piece < (set + 1) * each; ++piece) {
            before += sums[size_t(2 * piece)];
            after += sums[size_t(2 * piece + 1)];
        }
        scales[set] = given[set] != 0 && after < before ? fitted[size_t(set)] : given[set];
    }
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_histogram(const float* numbers, const float* weights, int64_t count, float low, float width, int32_t bins,
                                double* totals, int32_t threads) try {
    if (count < 0 || bins < 1 || !(width > 0) || !std::isfinite(width) || !std::isfinite(low) || !totals || (!numbers && count)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    // Each piece has bins of its own, and the pieces do not depend on the threads, nor does the order in which they are added.
    constexpr int64_t kMostPieces = 8, kFewest = 1 << 18;
    const int64_t pieces = std::min(kMostPieces, std::max<int64_t>(1, count / kFewest)), size = (count + pieces - 1) / pieces;
    std::vector<double> own(size_t(pieces * bins));
    auto job = [&](int64_t i) {
        const int64_t begin = std::min(count, i * size), end = std::min(count, begin + size);
        loops.bin(numbers + begin, weights ? weights + begin : nullptr, end - begin, low, width, bins, &own[size_t(i * bins)]);
    };
    share(at_least_one(threads), pieces, job);
    for (int32_t b = 0; b < bins; ++b) {
        totals[b] = 0;
        for (int64_t i = 0; i < pieces; ++i) totals[b] += own[size_t(i * bins + b)];
    }
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_pack_codes(const uint8_t* codes, int64_t rows, int64_t count, int32_t bits, uint8_t* packed,
                                 int32_t threads) try {
    if (rows < 0 || count < 0 || bits < 1 || bits > 8) return SLIMLM_BAD_ARGUMENT;
    const Steps steps(bits);
    const int64_t bytes = (count * bits + 7) / 8;
    share_rows(threads, rows, count, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) pack_row(steps, bits, codes + row * count, count, packed + row * bytes);
    });
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_unpack_codes(const uint8_t* packed, int64_t rows, int64_t count, int32_t bits, uint8_t* codes,
                                   int32_t threads) try {
    if (rows < 0 || count < 0 || bits < 1 || bits > 8) return SLIMLM_BAD_ARGUMENT;
    const Steps steps(bits);
    const int64_t bytes = (count * bits + 7) / 8;
    share_rows(threads, rows, count, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) unpack_row(steps, bits, packed + row * bytes, count, codes + row * count);
    });
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

namespace {

// body(T{}) for the unsigned integers of `size` bytes.
template <class F>
int with_type(int32_t size, F body) {
    if (size == 1)
        body(uint8_t{});
    else if (size == 2)
        body(uint16_t{});
    else if (size == 4)
        body(uint32_t{});
    else
        return SLIMLM_BAD_ARGUMENT;
    return SLIMLM_OK;
}

}  // namespace

extern "C" int slimlm_gather(const void* all, const uint8_t* mask, int64_t rows, int64_t width, int64_t kept, int32_t size, void* some,
                           int32_t threads) try {
    if (rows < 0 || width < 0 || kept < 0 || kept > width) return SLIMLM_BAD_ARGUMENT;
    return with_type(size, [&](auto zero) {
        using T = decltype(zero);
        share_rows(threads, rows, width, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                gather_row(static_cast<const T*>(all) + row * width, mask + row * width, width, kept, static_cast<T*>(some) + row * kept);
        });
    });
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_scatter(const void* some, const uint8_t* mask, int64_t rows, int64_t width, int64_t kept, int32_t size, void* all,
                            int32_t threads) try {
    if (rows < 0 || width < 0 || kept < 0 || kept > width) return SLIMLM_BAD_ARGUMENT;
    return with_type(size, [&](auto zero) {
        using T = decltype(zero);
        share_rows(threads, rows, width, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row)
                scatter_row(static_cast<const T*>(some) + row * kept, mask + row * width, width, kept, static_cast<T*>(all) + row * width);
        });
    });
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}
