// Kernels on weights: what Python hands over, and what the kernels share. One call takes any number of weights.
//
// In the order of memory a weight is groups x far x kept x inner. It has two systems of sets:
//
//     near   one set for each (group, far): kept * inner elements next to one another; the rows of most layers
//     apart  one set for each (group, kept): far pieces of inner elements; columns, and the rows of transposed convolutions
//
// Backward passes measure the weight again in place of keeping statistics: a row is read for its gradient anyway.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

#include "plan.h"
#include "statistic.h"
#include "vector.h"

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
    int32_t reserved;
};

// Pointers to one weight. All but gain's are of the weight's size and type; backward needs `gradient`, that of what forward wrote.
struct NkWeightCall {
    const void *weight;
    const void *gain;  // ? one for each set of NK_NORMALIZE
    const void *gradient;
    void *result;  // forward: the weight as it is used; backward: the gradient of the raw one
    void *dgain;   // ?
    // Of NK_SPECTRAL: the singular vectors, of the weight's type, improved in place by forward; and 1 / sigma with the vectors that it was
    // computed from, 1 + far + kept elements of the accumulation type, which forward writes and backward reads.
    void *left, *right, *kept;
};

namespace nk {

// About as many elements as are worth a thread's while. Part of the rounding of sums: it must not depend on the number of threads.
constexpr int64_t GRAIN = 32768;
// Elements that one accumulator takes before it is merged in double precision.
constexpr int64_t STRETCH = 4096;

inline int64_t size_of(const NkWeightPlan &p) { return p.groups * p.far * p.kept * p.inner; }
inline int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }
// What rounding made negative is zero; NaN stays.
inline double positive(double v) { return v < 0 ? 0 : v; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The statistic of a set of n elements, in the terms of statistic.h.
inline NkPlan statistic_of(const NkWeightPlan &p, int64_t n) {
    NkPlan s{};
    s.far = s.mid = 1;
    s.inner = n;
    s.eps = p.eps;
    s.centred = p.centred;
    s.scale = p.scale;
    s.guard = p.guard;
    s.correction = p.correction;
    return s;
}

// Work on one weight: phases, one after the other, of tasks that may run at once. Merging partial results is a phase of its own.
struct Job {
    virtual ~Job() = default;
    virtual int64_t tasks(int phase) const = 0;  // 0: there is no such phase
    virtual void run(int phase, int64_t task) = 0;
};
using NewJob = std::unique_ptr<Job>;

template <class T> NewJob near_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);
template <class T> NewJob apart_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);
template <class T> NewJob both_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);
template <class T> NewJob spectral_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);

// A whole weight of NK_NORMALIZE over near sets that are short enough for one thread each.
bool fits_rows(const NkWeightPlan &plan);
int64_t rows_a_task(const NkWeightPlan &plan);
template <class T> void near_rows(const NkWeightPlan &plan, const NkWeightCall &call, bool backward, int64_t begin, int64_t end);

// Where vector i of a stretch is: whole, or the last few elements of it; `only` makes zeros of what is not there.
struct Whole {
    int64_t i;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return load(p + i); }
    template <class T> void put(T *p, Vec<accumulator<T>> v) const { store(p + i, v); }
    template <class A> Vec<A> only(Vec<A> v) const { return v; }
};
struct Part {
    int64_t i, n;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return load_some(p + i, n); }
    template <class T> void put(T *p, Vec<accumulator<T>> v) const { store_some(p + i, v, n); }
    template <class A> Vec<A> only(Vec<A> v) const { return select<A>(first<A>(n), v, Vec<A>{}); }
};

// each(at): a vector at a time over n elements.
template <class Each> inline void over(int64_t n, Each &&each) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) each(Whole{i});
    if (i < n) each(Part{i, n - i});
}

// Adds K sums over n elements to totals; each(at, sums) adds one vector to each sum, and zeros where `at` reads zeros. Four vectors at once
// hide what an addition takes.
template <class A, int K, class Each> inline void sum_over(int64_t n, double (&totals)[K], Each &&each) {
    for (int64_t begin = 0; begin < n; begin += STRETCH) {
        int64_t end = begin + STRETCH < n ? begin + STRETCH : n, i = begin;
        Vec<A> a[K] = {}, b[K] = {}, c[K] = {}, d[K] = {};
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
            each(Whole{i}, a);
            each(Whole{i + LANES}, b);
            each(Whole{i + 2 * LANES}, c);
            each(Whole{i + 3 * LANES}, d);
        }
        for (; i + LANES <= end; i += LANES) each(Whole{i}, a);
        if (i < end) each(Part{i, end - i}, b);
        for (int k = 0; k < K; ++k) totals[k] += sum_lanes<A>((a[k] + b[k]) + (c[k] + d[k]));
    }
}

// As many zeros, or none where there is nothing.
template <class A> std::unique_ptr<A[]> zeros(int64_t n) { return std::unique_ptr<A[]>(n > 0 ? new A[std::size_t(n)]() : nullptr); }

}  // namespace nk
