// Kernels on weights: what Python hands over, and how their work is cut. One call takes any number of weights.
//
// In the order of memory a weight is groups x far x kept x inner. It has two systems of sets:
//
//     near   one set for each (group, far): kept * inner elements next to one another; the rows of most layers
//     apart  one set for each (group, kept): far pieces of inner elements; columns, and the rows of transposed convolutions
//
// Backward passes measure the weight again in place of keeping statistics: a row is read for its gradient anyway.
#pragma once
#include <memory>

#include "plan.h"
#include "row.h"
#include "statistic.h"

enum NkSets : int32_t { NK_NEAR = 0, NK_APART = 1 };
enum NkMethod : int32_t {
    NK_NORMALIZE = 0,     // the sets of one system, by any statistic
    NK_SEQUENTIAL = 1,    // norms of one system, then of the other, of what came out
    NK_SIMULTANEOUS = 2,  // norms of both
    NK_RUIZ = 3,          // roots of the norms of both, again and again
    NK_SPECTRAL = 4,      // the largest singular value of the far x kept matrix
};

struct NkWeightPlan {
    int64_t groups, far, kept, inner;
    double eps, factor;  // the factor multiplies the result, the length of the gains too
    int32_t type, method;
    int32_t sets;  // of NK_NORMALIZE; of NK_SEQUENTIAL those that come first
    int32_t centred, scale, guard, correction;
    int32_t constant;    // 1: backward takes the divisors as constants
    int32_t iterations;  // of NK_RUIZ; of NK_SPECTRAL, 0 to leave the vectors as they are
    int32_t parts;       // NK_GAIN
};

// Pointers to one weight, all but gain's and dgain's to groups * far * kept * inner elements of its type.
struct NkWeightCall {
    const void *weight;
    const void *gain;      // of NK_NORMALIZE: one for each set, of the weight's type; null unless plan.parts has NK_GAIN
    const void *gradient;  // backward: that of what forward wrote; else null
    void *result;          // forward: the weight as it is used; backward: the gradient of the raw one
    void *dgain;           // backward: as the gain; null where it is not wanted
    // Of NK_SPECTRAL, else null. The singular vectors, `far` and `kept * inner` elements of the weight's type, which forward improves in
    // place; and 1 / sigma with the vectors that it was computed from, 1 + far + kept * inner elements of the accumulation type, which
    // forward writes and backward reads.
    void *left, *right, *kept;
};

namespace nk {

// About as many elements as are worth a thread's while. Part of the rounding of sums: it must not depend on the number of threads.
constexpr int64_t GRAIN = 32768;
inline int64_t size_of(const NkWeightPlan &p) { return p.groups * p.far * p.kept * p.inner; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The statistic of a set of n elements, as an ordinary rule's.
inline NkPlan statistic_of(const NkWeightPlan &p, int64_t n) {
    NkPlan s{};
    s.outer = s.far = s.kept = s.mid = 1;
    s.inner = n;
    s.type = p.type, s.eps = p.eps;
    s.centred = p.centred, s.scale = p.scale, s.guard = p.guard, s.correction = p.correction;
    return s;
}

// How a matrix is cut: a task has a chunk of `rows` rows of n elements, of which a band stays in the cache from one look to the next.
struct Bands {
    const int64_t n, rows, chunks, band;

    Bands(const NkWeightPlan &p, int64_t most, std::size_t size)
        : n(p.kept * p.inner), rows(std::max({GRAIN / n, ceil_div(p.far, most), int64_t(1)})), chunks(ceil_div(p.far, rows)),
          band(std::clamp<int64_t>((1 << 17) / int64_t(size) / n, 1, 8)) {}

    // into <- the sums over rows [from, to) of on_lane(at, r), where `at` says which lanes; before that each row is passed to on_row(r).
    template <class A, class OnRow, class OnLane> void sum_rows(A *into, int64_t from, int64_t to, OnRow &&on_row, OnLane &&on_lane) const {
        std::fill_n(into, n, A(0));
        for (; from < to; from += band) {
            const int64_t begin = from, end = std::min(from + band, to);
            for (int64_t r = begin; r < end; ++r) on_row(r);
            over(n, [&](auto at) {
                Vec<A> total = at(into);
                for (int64_t r = begin; r < end; ++r) total += on_lane(at, r);
                at.put(into, total);
            });
        }
    }
};

// The sum of terms(at) over n elements.
template <class A, class Terms> double sum_of(int64_t n, Terms &&terms) {
    double total[1] = {};
    sum_over<A>(n, total, [&](auto at, auto *s) { s[0] += terms(at); });
    return total[0];
}

// Work on one weight: phases, one after the other, of tasks that may run at once. Merging partial results is a phase of its own.
struct Job {
    virtual ~Job() = default;
    virtual int64_t tasks(int phase) const = 0;  // 0: there is no such phase
    virtual void run(int phase, int64_t task) = 0;
};
using NewJob = std::unique_ptr<Job>;

template <class T> NewJob both_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);
template <class T> NewJob spectral_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);

// NK_NORMALIZE over near sets [begin, end).
template <class T> void near_rows(const NkWeightPlan &plan, const NkWeightCall &call, bool backward, int64_t begin, int64_t end);

}  // namespace nk
