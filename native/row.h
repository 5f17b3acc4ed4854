// The vectors of a row, and its tail: elements side by side, a vector at a time.
#pragma once
#include "stream.h"

namespace nk {

// Elements that one accumulator takes before it is merged in double precision.
constexpr int64_t STRETCH = 4096;

// Where vector i of a row is: at(p) reads it, at.put(p, v) writes it, at.only(v) makes zeros of what is no element, or no new one.
struct VectorAt {
    int64_t i;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return load(p + i); }
    template <class T> void put(T *p, Vec<accumulator<T>> v, bool far = false) const { far ? stream(p + i, v) : store(p + i, v); }
    template <class A> Vec<A> only(Vec<A> v) const { return v; }
};
// The last few elements, and zeros behind them.
struct TailAt {
    int64_t i, n;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return load_some(p + i, n); }
    template <class T> void put(T *p, Vec<accumulator<T>> v, bool = false) const { store_some(p + i, v, n); }
    template <class A> Vec<A> only(Vec<A> v) const { return select<A>(first<A>(n), v, Vec<A>{}); }
};
// The last LANES elements of a row of n, as one vector, some of which are in the vector before it; a shorter row is padded. Faster than
// TailAt, and not for adding to what is there.
struct OverlapAt {
    int64_t n, i = n < LANES ? 0 : n - LANES;
    template <class T> Vec<accumulator<T>> operator()(const T *p) const { return n < LANES ? load_some(p, n) : load(p + i); }
    template <class T> void put(T *p, Vec<accumulator<T>> v, bool = false) const { n < LANES ? store_some(p, v, n) : store(p + i, v); }
    template <class A> Vec<A> only(Vec<A> v) const {
        return select<A>(n < LANES ? first<A>(n) : ~first<A>(LANES - n % LANES), v, Vec<A>{});
    }
};

// Further along p, where there is one.
template <class P> inline P *along(P *p, int64_t n) { return p == nullptr ? p : p + n; }

inline int64_t in_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
// each(at) over a row of n, with the faster tail.
template <class Each> inline void for_vectors(int64_t n, Each &&each) {
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + LANES <= n; i += LANES) each(VectorAt{i});
    if (i < n) each(OverlapAt{n});
}
// With the exact one.
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

}  // namespace nk
