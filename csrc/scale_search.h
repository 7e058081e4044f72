// The search for scales: for each set of numbers ("points") the scale of least sum of weight x (grid value x scale - point)^2.
// With a zero for each scale: of ((clamp(round(point / scale) + zero) - zero) x scale - point)^2. The laws are
// slimlm/core/solvers/scale_search.py and affine_search.py, which say what is tried and why; the candidates here are the same.
//
// All is arithmetic on vectors. Of small sets a vector holds one point of each of kLanes sets, so each lane searches by itself and
// nothing is ever added up across lanes. Of a large set a vector holds kLanes of its points; then every lane has the same
// candidates, and costs are added up across the lanes. Points and weights are copied in that order, and a few candidates at a
// time pass over them.

#ifndef SLIMLM_SCALE_SEARCH_H
#define SLIMLM_SCALE_SEARCH_H

#include <algorithm>
#include <cmath>
#include <vector>

#include "loops.h"
#include "vectors.h"

namespace slimlm {
namespace {

// Candidates of one pass over the points: their scales, inverses and sums are in registers.
constexpr int kCandidates = kLanes == 16 ? 8 : 4;
constexpr int kAffineCandidates = 4;  // with zeros of their own
constexpr int kFine = 4;          // candidates on either side of the best, in each refinement
constexpr int kRefinements = 3;
constexpr int kNearby = 7;
constexpr float kNearbyReach = 1.12f;
// Vectors that are added up before their sum joins the others, lest the many be lost beside a large sum.
constexpr int64_t kSummed = 128;

// The even grid, which may be shifted: whole numbers from `smallest` to `largest`.
struct EvenGrid {
    Floats low, high;

    EvenGrid() = default;
    EvenGrid(float smallest, float largest) : low(all(smallest + kToWhole)), high(all(largest + kToWhole)) {}
    // Codes from 0 to `top`, of which `zero` stands for zero.
    EvenGrid(Floats zero, float top) : low(all(kToWhole) - zero), high(all(kToWhole + top) - zero) {}
    // The value nearest to point x inverse. Clamped after rounding: what is too large for kToWhole is beyond the ends in any case.
    SLIMLM_LOCAL Floats nearest(Floats point, Floats inverse) const {
        const Floats magic = all(kToWhole);
        return smaller(larger(multiply_add(point, inverse, magic), low), high) - magic;
    }
};

// At most sixteen values in ascending order.
struct Codebook {
#if defined(__AVX512F__)
    // Borders between values by how many are known to lie below: of eight, four, two and one of the indices left.
    Floats by_eight, by_four, by_two, by_one, values;

    Codebook(const float* given, int count) {
        float borders[16], value[16];
        for (int i = 0; i < 16; ++i) {
            value[i] = given[std::min(i, count - 1)];
            borders[i] = i + 1 < count ? (given[i] + given[i + 1]) / 2 : HUGE_VALF;
        }
        values = load(value);
        by_eight = all(borders[7]);
        float shifted[3][16];
        for (int i = 0; i < 16; ++i)
            for (int step = 0; step < 3; ++step) shifted[step][i] = borders[std::min(15, i + (1 << step) - 1)];
        by_one = load(shifted[0]);
        by_two = load(shifted[1]);
        by_four = load(shifted[2]);
    }
    SLIMLM_LOCAL Floats nearest(Floats point, Floats inverse) const {
        const __m512 ratio = point * inverse;
        __m512i index = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(ratio, by_eight, _CMP_GT_OQ), 8);
        index = further(index, ratio, by_four, 4);
        index = further(index, ratio, by_two, 2);
        index = further(index, ratio, by_one, 1);
        return _mm512_permutexvar_ps(index, values);
    }

private:
    static SLIMLM_LOCAL __m512i further(__m512i index, __m512 ratio, __m512 borders, int step) {
        const __mmask16 above = _mm512_cmp_ps_mask(ratio, _mm512_permutexvar_ps(index, borders), _CMP_GT_OQ);
        return _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(step));
    }
#else
    Floats borders[15], values[16];
    int count;

    Codebook(const float* given, int n) : count(n) {
        for (int i = 0; i < count; ++i) values[i] = all(given[i]);
        for (int i = 0; i + 1 < count; ++i) borders[i] = all((given[i] + given[i + 1]) / 2);
    }
    SLIMLM_LOCAL Floats nearest(Floats point, Floats inverse) const {
        const Floats ratio = point * inverse;
        Floats value = values[0];
        for (int i = 1; i < count; ++i) value = where(ratio > borders[i - 1], values[i], value);
        return value;
    }
#endif
};

double sum_of(Floats a) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += double(a[lane]);
    return total;
}

// Points and weights of kLanes sets, or of one, as vectors: a vector of points and then their weights, and so on.
class Points {
public:
    // Of the sets from `first` on. With `one`, of the first alone.
    void take(const SlimlmSets& from, int64_t first, bool one) {
        one_ = one;
        count_ = one ? (from.size + kLanes - 1) / kLanes : from.size;
        data_.resize(size_t(count_) * 2 * kLanes);
        const float* points = from.points + first * from.points_per_set;
        const float* weights = from.weights + first * from.weights_per_set;
        if (one) {
            copy(points, from.points_per_point, from.size, data_.data());
            copy(weights, from.weights_per_point, from.size, data_.data() + kLanes);
        } else {
            const int64_t sets = std::min<int64_t>(kLanes, from.sets - first);
            copy(points, from.points_per_set, from.points_per_point, sets, data_.data());
            copy(weights, from.weights_per_set, from.weights_per_point, sets, data_.data() + kLanes);
        }
    }

    // The largest magnitude of a point with a weight above zero, and that weight: of each lane, or of all. Without any such point
    // they are those of the first.
    void largest(Floats& magnitude, Floats& weight) const {
        magnitude = weight = Floats{};
        for (int64_t i = 0; i < count_; ++i) {
            const Floats w = weight_at(i), size = where(w > Floats{}, magnitude_of(point_at(i)), Floats{});
            weight = where(size > magnitude, w, weight);
            magnitude = larger(magnitude, size);
        }
        if (one_) {
            int best = 0;
            for (int lane = 1; lane < kLanes; ++lane)
                if (magnitude[lane] > magnitude[best]) best = lane;
            magnitude = all(magnitude[best]);
            weight = all(weight[best]);
        }
        const Floats point = one_ ? all(point_at(0)[0]) : point_at(0), its = one_ ? all(weight_at(0)[0]) : weight_at(0);
        weight = where(magnitude > Floats{}, weight, its);
        magnitude = where(magnitude > Floats{}, magnitude, magnitude_of(point));
    }

    // The smallest and the largest point with a weight above zero, and zero among them.
    void extremes(Floats& smallest, Floats& largest) const {
        smallest = largest = Floats{};
        for (int64_t i = 0; i < count_; ++i) {
            const Floats point = where(weight_at(i) > Floats{}, point_at(i), Floats{});
            smallest = smaller(smallest, point);
            largest = larger(largest, point);
        }
        if (!one_) return;
        float low = 0, high = 0;
        for (int lane = 0; lane < kLanes; ++lane) {
            low = std::min(low, float(smallest[lane]));
            high = std::max(high, float(largest[lane]));
        }
        smallest = all(low);
        largest = all(high);
    }

    // costs [kCount]: the sum of weight x error^2 under each of kCount scales; grids[c] is the grid of scale c.
    template <int kCount, class Grids>
    SLIMLM_LOCAL void costs(Grids grids, const Floats* scales, Floats* costs) const {
        Floats scale[kCount], inverse[kCount], total[kCount];
        for (int c = 0; c < kCount; ++c) {
            scale[c] = scales[c];
            inverse[c] = all(1) / scale[c];
            total[c] = Floats{};
        }
        for (int64_t begin = 0; begin < count_; begin += kSummed) {
            const int64_t end = std::min(count_, begin + kSummed);
            Floats sum[kCount] = {};
            for (int64_t i = begin; i < end; ++i) {
                const Floats point = point_at(i), weight = weight_at(i);
#pragma GCC unroll 8
                for (int c = 0; c < kCount; ++c) {
                    const Floats error = subtract_product(point, grids[c].nearest(point, inverse[c]), scale[c]);
                    sum[c] = multiply_add(weight * error, error, sum[c]);
                }
            }
            for (int c = 0; c < kCount; ++c) total[c] += sum[c];
        }
        for (int c = 0; c < kCount; ++c) costs[c] = together(total[c]);
    }

    // The scale of least squares for the values under a scale: sum(w x v) / sum(w v v), NaN where that is 0 / 0. What it differs by
    // from the scale given is added up, which is small, so that little is lost to rounding.
    template <class G>
    Floats fitted(const G& grid, Floats scale) const {
        const Floats inverse = all(1) / scale;
        Floats along = {}, square = {};
        for (int64_t begin = 0; begin < count_; begin += kSummed) {
            const int64_t end = std::min(count_, begin + kSummed);
            Floats a = {}, s = {};
            for (int64_t i = begin; i < end; ++i) {
                const Floats point = point_at(i), value = grid.nearest(point, inverse), weighted = weight_at(i) * value;
                a = multiply_add(weighted, subtract_product(point, value, scale), a);
                s = multiply_add(weighted, value, s);
            }
            along += a;
            square += s;
        }
        return scale + together(along) / together(square);
    }

private:
    SLIMLM_LOCAL Floats point_at(int64_t i) const { return load(data_.data() + 2 * kLanes * i); }
    SLIMLM_LOCAL Floats weight_at(int64_t i) const { return load(data_.data() + 2 * kLanes * i + kLanes); }

    Floats together(Floats sum) const {
        if (!one_) return sum;
        return all(float(sum_of(sum)));
    }

    // One set: to every second vector of `into`, zeros at the end.
    void copy(const float* from, int64_t stride, int64_t size, float* into) const {
        for (int64_t i = 0; i < count_; ++i)
            for (int lane = 0; lane < kLanes; ++lane) {
                const int64_t at = i * kLanes + lane;
                into[2 * kLanes * i + lane] = at < size ? from[at * stride] : 0.f;
            }
    }
    // Several sets: likewise, zeros in the lanes without a set.
    void copy(const float* from, int64_t per_set, int64_t per_point, int64_t sets, float* into) const {
        if (sets == kLanes && per_set == 1) {
            for (int64_t i = 0; i < count_; ++i) std::memcpy(into + 2 * kLanes * i, from + i * per_point, 4 * kLanes);
            return;
        }
        for (int64_t i = 0; i < count_; ++i)
            for (int lane = 0; lane < kLanes; ++lane)
                into[2 * kLanes * i + lane] = lane < sets ? from[i * per_point + lane * per_set] : 0.f;
    }

    std::vector<float> data_;
    int64_t count_ = 0;
    bool one_ = false;
};

// The same grid for every candidate.
template <class G>
struct Same {
    const G& grid;
    SLIMLM_LOCAL const G& operator[](int) const { return grid; }
};

// The best of the scales tried so far, of each lane.
template <class G>
struct Best {
    const Points& points;
    const G& grid;
    Floats scale, cost;

    // Tries `count` candidates; of equal ones the earlier stays.
    void try_all(const Floats* candidates, int count) {
        int c = 0;
        for (; c + kCandidates <= count; c += kCandidates) some<kCandidates>(candidates + c);
        for (; c + 4 <= count; c += 4) some<4>(candidates + c);
        for (; c < count; ++c) some<1>(candidates + c);
    }

private:
    template <int kCount>
    void some(const Floats* candidates) {
        Floats costs[kCount];
        points.template costs<kCount>(Same<G>{grid}, candidates, costs);
        for (int c = 0; c < kCount; ++c) {
            scale = where(costs[c] < cost, candidates[c], scale);
            cost = smaller(costs[c], cost);
        }
    }
};

// body(next, vectors) for pieces of numbers in order, where next(i, point, weight) gives vector i of the piece; zeros at the end.
template <class F>
void for_vectors(const float* points, const float* weights, int64_t count, F body) {
    const int64_t whole = count / kLanes;
    for (int64_t begin = 0; begin < whole; begin += kSummed)
        body(
            [&](int64_t i, Floats& point, Floats& weight) {
                point = load(points + (begin + i) * kLanes);
                weight = weights ? load(weights + (begin + i) * kLanes) : all(1);
            },
            std::min(kSummed, whole - begin));
    if (const int64_t rest = count - whole * kLanes)
        body(
            [&](int64_t, Floats& point, Floats& weight) {
                point = weight = Floats{};
                for (int64_t lane = 0; lane < rest; ++lane) {
                    point[lane] = points[whole * kLanes + lane];
                    weight[lane] = weights ? weights[whole * kLanes + lane] : 1;
                }
            },
            1);
}

// The best positive scale (or, with sign -1, negative one) and its cost; in a lane of zeros the scale is anything.
template <class G>
Best<G> best_of_sign(const Points& points, const G& grid, const SlimlmGrid& about, int coarse, float sign) {
    const float top = about.values[about.count - 1], reach = std::max(std::fabs(about.values[0]), std::fabs(top));
    Floats largest, weight;
    points.largest(largest, weight);
    const Floats upper = where(largest > Floats{}, largest / all(top), all(1));
    const Floats first = upper * all(sign);
    Best<G> best{points, grid, first, {}};
    points.template costs<1>(Same<G>{grid}, &first, &best.cost);
    const Floats clipped = largest - root(best.cost / larger(weight, all(1e-30f)));
    Floats lower = larger(clipped / all(reach), upper / all(4096));
    lower = smaller(lower, upper * all(top / reach * 0.999f));

    const Floats step = power(lower / upper, 1 / float(coarse - 1));
    Floats candidates[kCandidates], next = first;
    float inner = std::floor(top / 2) + 1;
    for (int tried = 1, count = 0; tried < coarse || inner < top; count = 0) {
        for (; count < kCandidates && tried < coarse; ++tried) candidates[count++] = next *= step;
        for (; count < kCandidates && inner < top; ++inner) candidates[count++] = first * all(top / inner);
        best.try_all(candidates, count);
    }

    Floats ratio = all(1) / step;
    for (int refinement = 0; refinement < kRefinements; ++refinement) {
        ratio = root(root(ratio));
        Floats around[2 * kFine], up = best.scale, down = best.scale;
        for (int i = 0; i < kFine; ++i) {
            around[kFine - 1 - i] = down = down / ratio;
            around[kFine + i] = up = up * ratio;
        }
        best.try_all(around, 2 * kFine);
    }
    return best;
}

template <class G>
void best_scales(const SlimlmSets& sets, const SlimlmGrid& about, const G& grid, int coarse, bool either_sign, int64_t first,
                 int64_t last, float* scales) {
    Points points;
    const bool one = sets.size > kSmallSet;
    for (int64_t set = first; set < last; set += one ? 1 : kLanes) {
        points.take(sets, set, one);
        const Best<G> plain = best_of_sign(points, grid, about, coarse, 1);
        Floats scale = plain.scale;
        if (either_sign) {
            const Best<G> turned = best_of_sign(points, grid, about, coarse, -1);
            scale = where(turned.cost < plain.cost, turned.scale, scale);
        }
        Floats magnitude, weight;
        points.largest(magnitude, weight);
        scale = where(magnitude > Floats{}, scale, Floats{});
        for (int lane = 0; lane < (one ? 1 : kLanes) && set + lane < last; ++lane) scales[set + lane] = scale[lane];
    }
}

template <class G>
void nearby_scales(const SlimlmSets& sets, const G& grid, const float* start, int64_t first, int64_t last, float* scales) {
    Points points;
    float steps[kNearby];
    for (int i = 0; i < kNearby; ++i) steps[i] = std::pow(kNearbyReach, 2 * float(i) / (kNearby - 1) - 1);
    const bool one = sets.size > kSmallSet;
    for (int64_t set = first; set < last; set += one ? 1 : kLanes) {
        points.take(sets, set, one);
        Floats old = one ? all(start[set]) : Floats{};
        for (int lane = 0; !one && lane < kLanes && set + lane < last; ++lane) old[lane] = start[set + lane];
        const Floats safe = where(old == Floats{}, all(1), old);
        Floats candidates[kNearby];
        for (int i = 0; i < kNearby; ++i) candidates[i] = safe * all(steps[i]);
        Best<G> best{points, grid, candidates[0], all(HUGE_VALF)};
        best.try_all(candidates, kNearby);
        // Least squares for the best one's codes: 0 / 0 where they are all zero, and then there is nothing to gain.
        const Floats fitted = points.fitted(grid, best.scale);
        const Floats usable = where((magnitude_of(fitted) > Floats{}) & (magnitude_of(fitted) < all(HUGE_VALF)), fitted, best.scale);
        best.try_all(&usable, 1);
        const Floats scale = where(old == Floats{}, old, best.scale);
        for (int lane = 0; lane < (one ? 1 : kLanes) && set + lane < last; ++lane) scales[set + lane] = scale[lane];
    }
}

void best_scale(const SlimlmSets& sets, const SlimlmGrid& grid, int coarse, bool either_sign, int64_t first, int64_t last,
                float* scales) {
    if (grid.even)
        best_scales(sets, grid, EvenGrid(grid.values[0], grid.values[grid.count - 1]), coarse, either_sign, first, last, scales);
    else
        best_scales(sets, grid, Codebook(grid.values, grid.count), coarse, either_sign, first, last, scales);
}

void nearby_scale(const SlimlmSets& sets, const SlimlmGrid& grid, const float* start, int64_t first, int64_t last, float* scales) {
    if (grid.even)
        nearby_scales(sets, EvenGrid(grid.values[0], grid.values[grid.count - 1]), start, first, last, scales);
    else
        nearby_scales(sets, Codebook(grid.values, grid.count), start, first, last, scales);
}

// The best scale and zero of codes from 0 to `top` tried so far.
struct BestAffine {
    const Points& points;
    const float top;
    Floats scale, zero, cost;

    void try_all(const Floats* scales, const Floats* zeros, int count) {
        constexpr int kCount = kAffineCandidates;
        for (int c = 0; c < count; c += kCount) {
            EvenGrid grids[kCount];
            Floats scale_of[kCount], zero_of[kCount], costs[kCount];
            for (int i = 0; i < kCount; ++i) {
                scale_of[i] = scales[std::min(c + i, count - 1)];
                zero_of[i] = zeros[std::min(c + i, count - 1)];
                grids[i] = EvenGrid(zero_of[i], top);
            }
            points.costs<kCount>(static_cast<const EvenGrid*>(grids), scale_of, costs);
            for (int i = 0; i < kCount; ++i) {
                const Mask better = costs[i] < cost;
                scale = where(better, scale_of[i], scale);
                zero = where(better, zero_of[i], zero);
                cost = smaller(costs[i], cost);
            }
        }
    }
};

BestAffine best_affine(const Points& points, float top, int coarse) {
    Floats low, high, largest, weight;
    points.extremes(low, high);
    points.largest(largest, weight);
    const Floats whole = all(kToWhole), last = all(top), none = {};
    const auto zero_within = [&](Floats zero) { return (smaller(larger(zero, none), last) + whole) - whole; };
    const Floats upper = where(high > low, (high - low) / last, all(1));
    BestAffine best{points, top, upper, zero_within(-low / upper), all(HUGE_VALF)};
    best.try_all(&upper, &best.zero, 1);
    const Floats clipped = largest - root(best.cost / larger(weight, all(1e-30f)));
    const Floats lower = smaller(larger(clipped / last, upper / all(4096)), upper * all(0.999f));

    const Floats step = power(lower / upper, 1 / float(coarse - 1));
    Floats scale = upper;
    for (int i = 0; i < coarse; ++i, scale *= step) {
        // The grid begins at the smallest point, ends at the largest one, or lies midway between the two.
        const Floats begins = -low / scale, ends = last - high / scale;
        const Floats scales[3] = {scale, scale, scale};
        const Floats zeros[3] = {zero_within(begins), zero_within(ends), zero_within((begins + ends) * all(0.5f))};
        best.try_all(scales, zeros, 3);
    }
    Floats ratio = all(1) / step;
    for (int refinement = 0; refinement < kRefinements; ++refinement) {
        ratio = root(root(ratio));
        Floats scales[2 * kFine], zeros[2 * kFine], up = best.scale, down = best.scale;
        for (int i = 0; i < kFine; ++i) {
            scales[kFine - 1 - i] = down = down / ratio;
            scales[kFine + i] = up = up * ratio;
            zeros[kFine - 1 - i] = zeros[kFine + i] = best.zero;
        }
        best.try_all(scales, zeros, 2 * kFine);
        const Floats beside[2] = {zero_within(best.zero - all(1)), zero_within(best.zero + all(1))};
        const Floats again[2] = {best.scale, best.scale};
        best.try_all(again, beside, 2);
    }
    return best;
}

void affine_scale(const SlimlmSets& sets, int bits, int coarse, int64_t first, int64_t last, float* scales, float* zeros) {
    Points points;
    const float top = float((1 << bits) - 1);
    const bool one = sets.size > kSmallSet;
    for (int64_t set = first; set < last; set += one ? 1 : kLanes) {
        points.take(sets, set, one);
        const BestAffine best = best_affine(points, top, coarse);
        Floats low, high;
        points.extremes(low, high);
        const Floats scale = where(high > low, best.scale, Floats{}), zero = where(high > low, best.zero, Floats{});
        for (int lane = 0; lane < (one ? 1 : kLanes) && set + lane < last; ++lane) {
            scales[set + lane] = scale[lane];
            zeros[set + lane] = zero[lane];
        }
    }
}

// Of points [count] and weights (NULL: ones), for the codes c under a scale on the even grid: the sums of w c (x - c scale) and
// w c c. Their ratio is what the least-squares scale of these codes differs by.
void code_sums(const float* points, const float* weights, int64_t count, float scale, float smallest, float largest, double* sums) {
    const EvenGrid grid(smallest, largest);
    const Floats wide = all(scale), inverse = all(1 / scale);
    double along = 0, square = 0;
    for_vectors(points, weights, count, [&](auto next, int64_t vectors) {
        Floats a = {}, s = {};
        for (int64_t i = 0; i < vectors; ++i) {
            Floats point, weight;
            next(i, point, weight);
            const Floats code = grid.nearest(point, inverse), weighted = weight * code;
            a = multiply_add(weighted, subtract_product(point, code, wide), a);
            s = multiply_add(weighted, code, s);
        }
        along += sum_of(a);
        square += sum_of(s);
    });
    sums[0] = along;
    sums[1] = square;
}

// Likewise: the sum of w (c scale - x)^2.
double code_error(const float* points, const float* weights, int64_t count, float scale, float smallest, float largest) {
    const EvenGrid grid(smallest, largest);
    const Floats wide = all(scale), inverse = all(1 / scale);
    double total = 0;
    for_vectors(points, weights, count, [&](auto next, int64_t vectors) {
        Floats sum = {};
        for (int64_t i = 0; i < vectors; ++i) {
            Floats point, weight;
            next(i, point, weight);
            const Floats error = subtract_product(point, grid.nearest(point, inverse), wide);
            sum = multiply_add(weight * error, error, sum);
        }
        total += sum_of(sum);
    });
    return total;
}

}  // namespace
}  // namespace slimlm

#endif
