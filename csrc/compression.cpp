// The functions that compression calls: arguments are checked, and the work is shared among threads.

#include "compression.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "loops.h"
#include "pool.h"

using namespace slimlm;

namespace {

// Weights of one job: enough that claiming it costs nothing beside it, few enough that threads end together.
constexpr int64_t kWeightsOfJob = 1 << 14;

int at_least_one(int32_t threads) { return threads < 1 ? 1 : threads; }

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
