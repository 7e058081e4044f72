// The pieces of the column sweep and of coordinate descent that compression calls: arguments are checked, and the outputs are
// shared among threads where they are independent of one another.

#include <algorithm>
#include <new>

#include "loops.h"
#include "pool.h"

using namespace slimlm;

namespace {

bool valid(const SlimlmRounding& rounding) {
    if (!rounding.scale) return true;
    if (rounding.per_input < 0 || rounding.per_output < 0 || rounding.per_output > 1) return false;
    return rounding.bits >= 1 && rounding.bits <= (rounding.codebook ? 4 : 8) && !(rounding.codebook && rounding.zero);
}

// Whether a piece of whole units lies in 0 .. in.
bool valid(int64_t low, int64_t high, int64_t in, int32_t of, int32_t kept) {
    if (low < 0 || high < low || high > in) return false;
    return of == 0 || (of <= kMostOfUnit && kept >= 1 && kept <= of && low % of == 0 && high % of == 0);
}

bool valid(const SlimlmSweep& s, int64_t low, int64_t high) {
    if (!valid(s.rounding) || !valid(low, high, s.in, s.of, s.kept)) return false;
    return s.remaining && s.value && s.error && s.upper && (s.mask || !s.of) && (s.index || !s.rounding.scale);
}

bool valid(const SlimlmDescent& d, int64_t low, int64_t high) {
    if (!d.rounding.scale || !valid(d.rounding) || !valid(low, high, d.in, d.of, d.kept)) return false;
    if (d.of && !(d.mask && d.places && d.among && d.inverse && d.upper && d.masks >= 1 && d.rounding.per_input == 0)) return false;
    return d.gradient && d.value && d.change && d.index && d.covariance;
}

// body(first, last) over the outputs.
template <class F>
int share_outputs(int64_t out, int32_t threads, F body) {
    auto job = [&](int64_t i) { body(i * kOutputsOfJob, std::min(out, (i + 1) * kOutputsOfJob)); };
    share(threads < 1 ? 1 : threads, (out + kOutputsOfJob - 1) / kOutputsOfJob, job);
    return SLIMLM_OK;
}

}  // namespace

extern "C" int slimlm_sweep(const SlimlmSweep* sweep, int64_t low, int64_t high, int32_t threads) try {
    if (!sweep || high - low > kMostInputs || !valid(*sweep, low, high)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    return share_outputs(sweep->out, threads, [&](int64_t first, int64_t last) { loops.sweep(*sweep, low, high, first, last); });
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_choose(const SlimlmSweep* sweep, int64_t low, int64_t high, int32_t threads) try {
    if (!sweep || !sweep->of || !valid(*sweep, low, high)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    return share_outputs(sweep->out, threads, [&](int64_t first, int64_t last) { loops.choose(*sweep, low, high, first, last); });
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_descend(const SlimlmDescent* descent, int64_t low, int64_t high, int32_t threads) try {
    if (!descent || high - low > kMostInputs || !valid(*descent, low, high)) return SLIMLM_BAD_ARGUMENT;
    const Loops& loops = active_loops();
    return share_outputs(descent->out, threads, [&](int64_t first, int64_t last) { loops.descend(*descent, low, high, first, last); });
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}

extern "C" int slimlm_descend_right(const SlimlmRightDescent* d, int64_t low, int64_t high) try {
    if (!d || low < 0 || high < low || high > d->in || d->rank < 1 || d->bits < 2 || d->bits > 8) return SLIMLM_BAD_ARGUMENT;
    if (!d->gradient || !d->along || !d->value || !d->scale || !d->index || !d->covariance || !d->inner || !d->inverse)
        return SLIMLM_BAD_ARGUMENT;
    active_loops().descend_right(*d, low, high);
    return SLIMLM_OK;
} catch (const std::bad_alloc&) {
    return SLIMLM_NO_MEMORY;
}
