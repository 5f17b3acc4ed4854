// Forward over sets whose elements lie next to one another: measure a set, then normalize it while it is in the cache.
#include <limits>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "segments.h"
#include "threads.h"

namespace nk {
namespace {

constexpr int UNROLL = 4;

// Sums about a shift: of x - shift, and of its square.
template <class A> struct Sums {
    Vec<A> first[UNROLL] = {}, second[UNROLL] = {};

    template <bool CENTRED> void add(int u, Vec<A> apart) {
        if constexpr (CENTRED) first[u] += apart;
        second[u] += apart * apart;
    }
    A total(const Vec<A> (&parts)[UNROLL]) const { return sum_lanes<A>((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

template <class T, bool CENTRED, class A = accumulator<T>> inline void add_run(Sums<A> &sums, const T *x, int64_t n, Vec<A> shift) {
    int64_t i = 0;
    for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
        for (int u = 0; u < UNROLL; ++u) sums.template add<CENTRED>(u, load(x + i + u * LANES) - shift);
    for (; i + LANES <= n; i += LANES) sums.template add<CENTRED>(0, load(x + i) - shift);
    if (End<A> end{n}) sums.template add<CENTRED>(1, select<A>(end.counts, end.load(x) - shift, Vec<A>{}));
}

// sum = x + residual, rounded to T.
template <class T> void add_residual(const T *x, const T *residual, T *sum, int64_t n) {
    End<accumulator<T>> end{n};
    auto last = end ? end.load(x) + end.load(residual) : Vec<accumulator<T>>{};
    for (int64_t i = 0; i + LANES <= n; i += LANES) store(sum + i, load(x + i) + load(residual + i));
    if (end) end.store(sum, last);
}

template <class T> class SegmentsForward {
    using A = accumulator<T>;
    const NkPlan &plan;
    const Forward<T> &call;
    const Runs whole, runs;  // for reading alone, and with the parameters
    const T *x;              // what is normalized

  public:
    SegmentsForward(const NkPlan &plan, const Forward<T> &call)
        : plan(plan), call(call), whole(runs_of(plan, false)), runs(runs_of(plan, true)), x(call.residual ? call.sum : call.x) {}

    void run() {
        if (runs.size() == 0 || runs.sets == 0) return;
        int64_t chunks = whole.chunks();
        if (chunks > 1 && runs.sets < 4 * threads()) return run_in_chunks(chunks);
        int64_t together = std::max<int64_t>(1, CHUNK / runs.size()), tasks = (runs.sets + together - 1) / together;
        for_each(tasks, [&](int64_t task) {
            for (int64_t set = task * together, end = std::min(runs.sets, set + together); set < end; ++set) {
                Moments<double> moments;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) moments = merge(moments, measure(set, chunk));
                apply(set, moments, 0, runs.size());
            }
        });
    }

  private:
    // Few and large sets: first all the parts are measured, then all are mapped.
    void run_in_chunks(int64_t chunks) {
        std::vector<Moments<double>> parts(runs.sets * chunks);
        for_each(runs.sets * chunks, [&](int64_t task) { parts[task] = measure(task / chunks, task % chunks); });
        for_each(runs.sets * chunks, [&](int64_t task) {
            int64_t set = task / chunks, begin = task % chunks * CHUNK;
            Moments<double> moments;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) moments = merge(moments, parts[set * chunks + chunk]);
            apply(set, moments, begin, std::min(begin + CHUNK, runs.size()));
        });
    }

    Moments<double> measure(int64_t set, int64_t chunk) const {
        int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, whole.size());
        Place at = place_of(plan, whole, set);
        if (plan.given) {
            if (call.residual) add_residuals(at, begin, end);
            return {};
        }
        return plan.centred ? moments_of<true>(at, begin, end) : moments_of<false>(at, begin, end);
    }

    void add_residuals(Place at, int64_t begin, int64_t end) const {
        walk(whole, at, begin, end, [&](const Stretch &s) {
            add_residual(call.x + s.x, call.residual + s.x, call.sum + s.x, s.n);
        });
    }

    template <bool CENTRED> Moments<double> moments_of(Place at, int64_t begin, int64_t end) const {
        Moments<double> moments;
        A shift = 0;
        for (int64_t from = begin; from < end; from += BLOCK) {
            int64_t to = std::min(from + BLOCK, end);
            if (call.residual) add_residuals(at, from, to);
            // What is subtracted before anything is squared: the chunk's first element, then the mean of the block before.
            if (CENTRED && from == begin) walk(whole, at, begin, begin + 1, [&](const Stretch &s) { shift = widen(x[s.x]); });
            auto block = moments_about<CENTRED>(at, from, to, shift);
            moments = merge(moments, block);
            shift = A(block.mean);
        }
        return moments;
    }

    template <bool CENTRED> Moments<double> moments_about(Place at, int64_t from, int64_t to, A shift) const {
        double n = double(to - from);
        for (int attempt = 0;; ++attempt) {
            Sums<A> sums;
            walk(whole, at, from, to, [&](const Stretch &s) { add_run<T, CENTRED>(sums, x + s.x, s.n, splat<A>(shift)); });
            double square = sums.total(sums.second);
            if constexpr (!CENTRED) return {n, 0, square};
            double first = sums.total(sums.first), apart = first / n, rest = square - first * apart;
            // Far from the mean, the difference has lost digits: the block, still in the cache, is read about its mean.
            if (attempt == 0 && first * apart > 8 * rest) {
                shift += A(apart);
                continue;
            }
            return {n, double(shift) + apart, rest < 0 ? 0 : rest};
        }
    }

    void apply(int64_t set, const Moments<double> &moments, int64_t begin, int64_t end) const {
        Map<A> map{0, 1, 0, plan.activation == NK_RELU ? A(0) : -std::numeric_limits<A>::infinity(), nullptr, nullptr};
        if (plan.given) {
            if (call.center) map.high = call.center[set];
            map.inverse = call.inverse[set];
        } else {
            map.high = A(moments.mean);
            map.inverse = inverse_scale<A>(plan, A(moments.square));
            map.low = A(moments.mean - double(map.high)) * map.inverse;
            if (begin == 0) {
                call.inverse[set] = map.inverse;
                if (call.center) call.center[set] = map.high;
                if (call.variance) call.variance[set] = A(moments.square / moments.n);
            }
        }
        walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
            Map<A> mine = map;
            if (runs.vector) {
                if (call.weight) mine.gain = call.weight + s.parameter;
                if (call.bias) mine.bias = call.bias + s.parameter;
            } else {
                A gain = call.weight ? call.weight[s.parameter] : A(1);
                mine.inverse *= gain;
                mine.low = map.low * gain - (call.bias ? call.bias[s.parameter] : A(0));
            }
            write(x + s.x, call.y + s.x, s.n, mine);
        });
    }

    void write(const T *from, T *y, int64_t n, Map<A> map) const {
        if (plan.activation <= NK_RELU) return map_any<T>(from, y, n, map);
        // The curved ones work on a stretch in the first cache, whatever the types and parameters.
        constexpr int64_t stretch = 1024;
        alignas(64) A mapped[stretch];
        for (int64_t i = 0; i < n; i += stretch) {
            int64_t m = std::min(stretch, n - i);
            map_any<A>(from + i, mapped, m, map);
            activate_run<A>(plan.activation, mapped, m);
            copy_run(mapped, y + i, m);
            if (map.gain) map.gain += m;
            if (map.bias) map.bias += m;
        }
    }

    static void copy_run(const A *from, T *to, int64_t n) {
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
        if (i < n) store_some(to + i, load(from + i), n - i);
    }
};

}  // namespace

template <class T> void segments_forward(const NkPlan &plan, const Forward<T> &call) { SegmentsForward<T>(plan, call).run(); }

template void segments_forward<float>(const NkPlan &, const Forward<float> &);
template void segments_forward<double>(const NkPlan &, const Forward<double> &);
template void segments_forward<bfloat16>(const NkPlan &, const Forward<bfloat16> &);
template void segments_forward<float16>(const NkPlan &, const Forward<float16> &);

}  // namespace nk
