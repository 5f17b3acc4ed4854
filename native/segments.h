// How a set lies in memory when its elements lie next to one another: runs that share one parameter, or one stretch of parameters.
#pragma once
#include <algorithm>

#include "plan.h"
#include "row.h"
#include "statistic.h"
#include "twin.h"

namespace nk {

// Runs may be short, and the compiler would rather call.
#define NK_INLINE inline __attribute__((always_inline))
// A function that only asks for memory to be fetched is nothing to GCC, unless it is inlined before GCC looks.
#define NK_ASK __attribute__((always_inline))

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
    Runs r{plan.outer * plan.kept, plan.kept,     plan.far,     plan.mid,           plan.inner,
           plan.per_far,           plan.per_kept, plan.per_mid, plan.per_inner != 0};
    if (!parameters) r.per_far = r.per_mid = 0, r.vector = false;
    if (r.length == 1 && r.per_mid <= 1) r.length = r.mid, r.mid = 1, r.vector = r.per_mid == 1;
    if (r.mid == 1 || r.per_mid == (r.vector ? r.length : 0)) r.length *= r.mid, r.mid = 1;
    if (r.far > 1 && r.kept == 1 && r.mid == 1 && r.per_far == (r.vector ? r.length : 0)) r.length *= r.far, r.far = 1;
    if (r.far == 1) r.per_far = 0;
    if (r.mid == 1) r.per_mid = 0;
    return r;
}

// From elements of a set that is written to those of the one that is read next; 0 where all is in the cache, and to ask for it costs more
// than it gains.
constexpr int64_t CACHE = 1 << 23;  // bytes
template <class T> inline int64_t step_ahead(const Runs &runs, int64_t sets_at_once) {
    if (runs.sets * runs.size() * int64_t(sizeof(T)) < CACHE) return 0;
    return runs.far > 1 ? runs.mid * runs.length : runs.size() * sets_at_once;
}

// Where a set begins, among the elements and among the parameters.
struct Place {
    int64_t x, parameter;
};
NK_INLINE Place place_of(const NkPlan &plan, const Runs &runs, int64_t set) {
    // Sets may be small, and divisions are slow.
    int64_t o = runs.kept == 1 ? set : set / runs.kept, k = runs.kept == 1 ? 0 : set - o * runs.kept;
    int64_t outer = 0;
    if (plan.outer_step != 0) outer = plan.outer_div == 1 ? o % plan.outer_mod * plan.outer_step : outer_place(plan, o);
    return {o * runs.far * runs.stride() + k * runs.mid * runs.length, outer + k * runs.per_kept};
}

// A stretch of n elements of the run (f, m): where it begins, in x, among the parameters, in the run, and in the set.
struct Stretch {
    int64_t x, parameter, n, f, m, inside, index;
};

// each(stretch) for the stretches that make up the elements [begin, end) of a set.
template <class Each> NK_INLINE void walk(const Runs &runs, Place at, int64_t begin, int64_t end, Each &&each) {
    if (runs.far == 1 && runs.mid == 1)
        return each(Stretch{at.x + begin, at.parameter + (runs.vector ? begin : 0), end - begin, 0, 0, begin, begin});
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

// The sets that share their parameters: those of one outer place, and of one k where that tells them apart.
struct Groups {
    const int64_t outer, kept;
    const bool one, by_k;
    const int64_t divisor, places, rows, count;

    Groups(const NkPlan &plan, const Runs &runs)
        : outer(plan.outer), kept(runs.kept), one(plan.outer_step == 0 || plan.outer_mod == 1), by_k(runs.per_kept != 0),
          divisor(one ? outer : plan.outer_div), places(one ? 1 : plan.outer_mod),
          rows((outer + divisor * places - 1) / (divisor * places) * divisor * (by_k ? 1 : kept)), count(places * (by_k ? kept : 1)) {}

    // The row-th set of a group, or -1 where the last cycle ends before it.
    int64_t set(int64_t group, int64_t row) const {
        if (places == 1 && kept == 1) return row;
        int64_t place = by_k ? group / kept : group, k = by_k ? group % kept : row % kept;
        if (!by_k) row /= kept;
        int64_t o = (row / divisor * places + place) * divisor + row % divisor;
        return o < outer ? o * kept + k : -1;
    }
};

// Two sums over a set: backward of g (times the gain, where that varies) and of that times x - center, forward of x - shift and its square.
template <class S> struct Pair {
    S g, gx;

    Pair &operator+=(const Pair &other) { return *this = {g + other.g, gx + other.gx}; }
};

// Half-way: sums of a stretch of at most BLOCK elements.
template <class A> struct PairSums {
    Vec<A> g[4] = {}, gx[4] = {};

    NK_INLINE void add(int u, Vec<A> v, Vec<A> apart) {
        g[u] += v;
        gx[u] += v * apart;
    }
    Pair<double> total() const {
        return {sum_lanes<A>((g[0] + g[1]) + (g[2] + g[3])), sum_lanes<A>((gx[0] + gx[1]) + (gx[2] + gx[3]))};
    }
};

// Adds a run: terms(at) gives what is summed and what it is weighted with, from elements that lie as those of at(p).
template <class T, class A, class Terms> NK_INLINE void add_run(PairSums<A> &sums, int64_t n, Terms &&terms) {
    auto add_twin = [&](int u, int64_t i) {
        auto [g, apart] = terms([&](auto *p) { return load_twin<T>(p + i); });
        sums.add(u, g.a, apart.a);
        sums.add(u + 1, g.b, apart.b);
    };
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        add_twin(0, i);
        add_twin(2, i + 2 * LANES);
    }
    for (; i + LANES <= n; i += LANES) {
        auto [g, apart] = terms(VectorAt{i});
        sums.add(0, g, apart);
    }
    if (const OverlapAt end{n}; i < n) {
        auto [g, apart] = terms(end);
        sums.add(1, end.only<A>(g), end.only<A>(apart));
    }
}

// Fills a run of y with value(at), where at(p) are the elements of p that lie as those of y: twins in the order of T, and vectors at the
// end. Every few of them, ask(i) may fetch what is read soon.
template <class T, class OUT, class Value, class Ask> NK_INLINE void fill(OUT *y, int64_t n, Value &&value, Ask &&ask) {
    using A = accumulator<T>;
    // The end is read before anything is written, so that y may be what is read.
    const OverlapAt end{n};
    Vec<A> last{};
    if (n % LANES) last = value(end);
    auto put = [&](int64_t i) { store_twin<T>(y + i, value([&](auto *p) { return load_twin<T>(p + i); })); };
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        ask(i);
        put(i);
        put(i + 2 * LANES);
    }
    for (; i + LANES <= n; i += LANES) VectorAt{i}.put(y, value(VectorAt{i}));
    if (n % LANES) end.put(y, last);
}

// The same, past the cache. Lines that the run has to itself are streamed; those at its ends are written the usual way, and not a byte of the
// others with them, as a line written both ways is fetched after all.
template <class T, class OUT, class Value, class Ask> NK_INLINE void fill_far(OUT *y, int64_t n, Value &&value, Ask &&ask) {
    constexpr int64_t step = std::max<int64_t>(LINE / int64_t(sizeof(OUT)), 4 * LANES);
    auto plain = [&](int64_t i, int64_t to) {
        for (; i + LANES <= to; i += LANES) VectorAt{i}.put(y, value(VectorAt{i}));
        if (i < to) TailAt{i, to - i}.put(y, value(TailAt{i, to - i}));
    };
    int64_t i = std::min(until_line(y), n);
    plain(0, i);
    for (; i + step <= n; i += step) {
        ask(i);
        for (int64_t j = i; j < i + step; j += 2 * LANES)
            stream_twin<OUT>(y + j, value([&](auto *p) { return load_twin<OUT>(p + j); }));
    }
    plain(i, n);
}

// A run mapped: gain * ((x - high) * inverse - low) + bias, and at least `least`. The mean is high + low / inverse; a gain or bias that
// is constant along the run is in inverse and low already. `ahead` is from an element to one that is read soon, or 0.
template <class OUT, class T, bool GAIN, bool BIAS, bool STREAM, class A = accumulator<T>>
void map_run(const T *x, OUT *y, int64_t n, A high, A inverse, A low, A least, const A *gain, const A *bias, int64_t ahead) {
    Vec<A> highs = splat<A>(high), inverses = splat<A>(inverse), lows = splat<A>(low), leasts = splat<A>(least);
    auto value = [&](auto &&at) {
        auto v = (at(x) - highs) * inverses - lows;
        if constexpr (GAIN && BIAS) v = v * at(gain) + at(bias);
        else if constexpr (GAIN) v = v * at(gain);
        else if constexpr (BIAS) v = v + at(bias);
        return at_least(v, leasts);
    };
    auto ask = [&](int64_t i) NK_ASK {
        if (ahead) fetch<4 * LANES>(x + i + ahead);
    };
    STREAM ? fill_far<T>(y, n, value, ask) : fill<T>(y, n, value, ask);
}

template <class OUT, class T, class A = accumulator<T>>
using Mapper = void (*)(const T *x, OUT *y, int64_t n, A high, A inverse, A low, A least, const A *gain, const A *bias, int64_t ahead);

template <class OUT, class T, bool STREAM> Mapper<OUT, T> mapper(bool gain, bool bias) {
    if (gain) return bias ? map_run<OUT, T, true, true, STREAM> : map_run<OUT, T, true, false, STREAM>;
    return bias ? map_run<OUT, T, false, true, STREAM> : map_run<OUT, T, false, false, STREAM>;
}

}  // namespace nk
