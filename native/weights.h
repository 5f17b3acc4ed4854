// What the kernels on weights share: how their work is cut, and how they walk a row.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

#include "plan.h"
#include "statistic.h"
#include "vector.h"
#include "weight_plan.h"

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
struct VectorAt {
    int64_t i;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return load(p + i); }
    template <class T> void put(T *p, Vec<accumulator<T>> v) const { store(p + i, v); }
    template <class A> Vec<A> only(Vec<A> v) const { return v; }
};
struct TailAt {
    int64_t i, n;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return load_some(p + i, n); }
    template <class T> void put(T *p, Vec<accumulator<T>> v) const { store_some(p + i, v, n); }
    template <class A> Vec<A> only(Vec<A> v) const { return select<A>(first<A>(n), v, Vec<A>{}); }
};

// each(at): a vector at a time over n elements.
template <class Each> inline void over(int64_t n, Each &&each) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) each(VectorAt{i});
    if (i < n) each(TailAt{i, n - i});
}

// Adds K sums over n elements to totals; each(at, sums) adds one vector to each sum, and zeros where `at` reads zeros. Four vectors at once
// hide what an addition takes.
template <class A, int K, class Each> inline void sum_over(int64_t n, double (&totals)[K], Each &&each) {
    for (int64_t begin = 0; begin < n; begin += STRETCH) {
        int64_t end = begin + STRETCH < n ? begin + STRETCH : n, i = begin;
        Vec<A> a[K] = {}, b[K] = {}, c[K] = {}, d[K] = {};
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
            each(VectorAt{i}, a);
            each(VectorAt{i + LANES}, b);
            each(VectorAt{i + 2 * LANES}, c);
            each(VectorAt{i + 3 * LANES}, d);
        }
        for (; i + LANES <= end; i += LANES) each(VectorAt{i}, a);
        if (i < end) each(TailAt{i, end - i}, b);
        for (int k = 0; k < K; ++k) totals[k] += sum_lanes<A>((a[k] + b[k]) + (c[k] + d[k]));
    }
}

// As many zeros, or none where there is nothing.
template <class A> std::unique_ptr<A[]> zeros(int64_t n) { return std::unique_ptr<A[]>(n > 0 ? new A[std::size_t(n)]() : nullptr); }

}  // namespace nk
