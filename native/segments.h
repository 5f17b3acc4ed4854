// How a set lies in memory when its elements lie next to one another: runs that share one parameter, or one stretch of parameters.
#pragma once
#include <algorithm>

#include "plan.h"
#include "statistic.h"
#include "vector.h"

namespace nk {

// Elements that one accumulator takes before it is merged in double precision, and that one task takes of a large set. Both are part of
// the result's rounding: they must not depend on the number of threads.
constexpr int64_t BLOCK = 4096;
constexpr int64_t CHUNK = 8 * BLOCK;

// A set is far x mid runs of `length` elements; run (f, m) of the set (o, k) begins at (((o * far + f) * kept + k) * mid + m) * length.
struct Runs {
    int64_t sets, kept, far, mid, length;
    int64_t per_far, per_kept, per_mid;
    bool vector;  // parameters vary along a run; otherwise one gain and one bias hold for all of it

    int64_t size() const { return far * mid * length; }
    int64_t chunks() const { return (size() + CHUNK - 1) / CHUNK; }
    int64_t stride() const { return kept * mid * length; }
};

// As long as they can be for these parameters; without parameters, for reading alone.
inline Runs runs_of(const NkPlan &plan, bool parameters) {
    Runs r{plan.outer * plan.kept, plan.kept, plan.far, plan.mid, plan.inner, plan.per_far, plan.per_kept, plan.per_mid, plan.per_inner != 0};
    if (!parameters) r.per_far = r.per_mid = 0, r.vector = false;
    if (r.length == 1 && r.per_mid <= 1) r.length = r.mid, r.mid = 1, r.vector = r.per_mid == 1;
    if (r.mid == 1 || r.per_mid == (r.vector ? r.length : 0)) r.length *= r.mid, r.mid = 1;
    if (r.far > 1 && r.kept == 1 && r.mid == 1 && r.per_far == (r.vector ? r.length : 0)) r.length *= r.far, r.far = 1;
    if (r.far == 1) r.per_far = 0;
    if (r.mid == 1) r.per_mid = 0;
    return r;
}

// Where a set begins, among the elements and among the parameters.
struct Place {
    int64_t x, parameter;
};
inline Place place_of(const NkPlan &plan, const Runs &runs, int64_t set) {
    // Sets may be small, and divisions are slow.
    int64_t o = runs.kept == 1 ? set : set / runs.kept, k = runs.kept == 1 ? 0 : set - o * runs.kept;
    int64_t outer = plan.outer_step == 0 ? 0 : outer_place(plan, o);
    return {o * runs.far * runs.stride() + k * runs.mid * runs.length, outer + k * runs.per_kept};
}

// A stretch of n elements of the run (f, m): where it begins, in x, among the parameters, in the run, and in the set.
struct Stretch {
    int64_t x, parameter, n, f, m, inside, index;
};

// each(stretch) for the stretches that make up the elements [begin, end) of a set.
template <class Each> inline void walk(const Runs &runs, Place at, int64_t begin, int64_t end, Each &&each) {
    int64_t run = begin == 0 ? 0 : begin / runs.length, inside = begin - run * runs.length;
    int64_t f = run < runs.mid ? 0 : run / runs.mid, m = run - f * runs.mid;
    while (begin < end) {
        int64_t n = std::min(runs.length - inside, end - begin);
        each(Stretch{at.x + f * runs.stride() + m * runs.length + inside,
                     at.parameter + f * runs.per_far + m * runs.per_mid + (runs.vector ? inside : 0), n, f, m, inside, begin});
        begin += n;
        inside = 0;
        if (++m == runs.mid) m = 0, ++f;
    }
}

// The end of a run, in one vector: its last LANES elements, of which `counts` marks those that no whole vector before it held. A run that
// is shorter than a vector is read with zeros behind it.
template <class A> struct End {
    int64_t n, rest, from;
    Mask<A> counts;

    explicit End(int64_t n)
        : n(n), rest(n % LANES), from(n < LANES ? 0 : n - LANES), counts(n < LANES ? nk::first<A>(n) : ~nk::first<A>(LANES - rest)) {}
    explicit operator bool() const { return rest != 0; }
    template <class T> Vec<A> load(const T *p) const { return n < LANES ? load_some(p, n) : nk::load(p + from); }
    template <class T> void store(T *p, Vec<A> v) const { n < LANES ? store_some(p, v, n) : nk::store(p + from, v); }
};

// A run mapped: gain * ((x - high) * inverse - low) + bias, at least `least`. The mean is high + low / inverse.
template <class A> struct Map {
    A high, inverse, low, least;
    const A *gain, *bias;  // along the run, or null: then they are in inverse and low
};

template <class OUT, class T, bool GAIN, bool BIAS, class A = accumulator<T>> void map_run(const T *x, OUT *y, int64_t n, const Map<A> &map) {
    Vec<A> high = splat<A>(map.high), inverse = splat<A>(map.inverse), low = splat<A>(map.low), least = splat<A>(map.least);
    auto mapped = [&](Vec<A> v, auto &&at) {
        v = (v - high) * inverse - low;
        if constexpr (GAIN && BIAS) v = v * at(map.gain) + at(map.bias);
        else if constexpr (GAIN) v = v * at(map.gain);
        else if constexpr (BIAS) v = v + at(map.bias);
        return select<A>(v < least, least, v);
    };
    // The end is read before anything is written, so that y may be x.
    End<A> end{n};
    Vec<A> last = end ? mapped(end.load(x), [&](const A *p) { return end.load(p); }) : Vec<A>{};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int u = 0; u < 4; ++u) {
            int64_t j = i + u * LANES;
            store(y + j, mapped(load(x + j), [&](const A *p) { return load(p + j); }));
        }
    for (; i + LANES <= n; i += LANES) store(y + i, mapped(load(x + i), [&](const A *p) { return load(p + i); }));
    if (end) end.store(y, last);
}

template <class OUT, class T, class A = accumulator<T>> void map_any(const T *x, OUT *y, int64_t n, const Map<A> &map) {
    if (map.gain && map.bias) return map_run<OUT, T, true, true>(x, y, n, map);
    if (map.gain) return map_run<OUT, T, true, false>(x, y, n, map);
    if (map.bias) return map_run<OUT, T, false, true>(x, y, n, map);
    map_run<OUT, T, false, false>(x, y, n, map);
}

}  // namespace nk
