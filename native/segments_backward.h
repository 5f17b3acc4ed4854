// Backward over sets whose elements lie next to one another: what the two ways share, by whether the gain varies along runs.
#pragma once
#include <limits>

#include "activation.h"
#include "kernels.h"
#include "room.h"
#include "segments.h"
#include "threads.h"

namespace nk {

constexpr int64_t PIECE = 1024;   // of gradients behind an activation, in the first cache
constexpr int64_t HELD = 16384;    // up to this size, a set keeps them from the first pass to the second

// dx = g * gain * inverse + (x - center) * along + shift.
template <class A> struct DxTerms {
    A center, inverse, along, shift;
};

template <class F> inline void with_flag(bool flag, F &&f) { flag ? f(std::true_type{}) : f(std::false_type{}); }

template <class T> class SegmentsBackward {
  protected:
    using A = accumulator<T>;
    const NkPlan &plan;
    const Backward<T> call;
    const Runs runs;
    const bool coupled;  // whether the statistic has a gradient, which couples the elements of a set
    const bool saved;  // whether x is computed again from the output
    const bool curved;  // whether gradients have to be prepared: they pass an activation first
    const bool parameters;
    const bool streamed;
    const A full_strength;  // where eps lies inside the root; elsewhere it depends on the set
    const double share;     // of an element in the mean

    SegmentsBackward(const NkPlan &plan, const Backward<T> &call)
        : plan(plan), call(call), runs(runs_of(plan, call.weight || call.bias || call.dweight || call.dbias)),
          coupled(!plan.given && (plan.centred || plan.scale != NK_UNSCALED)), saved(call.kind <= OUTPUT),
          curved(!saved && plan.activation > (runs.vector ? NK_LINEAR : NK_RELU)), parameters(call.dweight || call.dbias),
          streamed(streams()), full_strength(strength<A>(plan, A(1))), share(1 / double(runs.size())) {}

    bool streams() const {
        int64_t bytes = runs.length * int64_t(sizeof(T));
        if (!plan.stream || !on_element(call.dx)) return false;
        return runs.vector ? bytes % LINE == 0 && until_line(call.dx) == 0 : bytes >= 8 * LINE && !curved;
    }

    // Of an output whose bias and gain are undone, what x - center is a multiple of it.
    A center(int64_t set) const { return saved ? 1 / inverse(set) : call.center ? calm(call.center[set]) : A(0); }
    A inverse(int64_t set) const { return call.inverse ? calm(call.inverse[set]) : A(1); }

    // f(kind) of the output.
    template <class F> auto of_output(F &&f) const {
        return call.kind == OUTPUT ? f(std::integral_constant<int, OUTPUT>{}) : f(std::integral_constant<int, LEAKY_OUTPUT>{});
    }

    // From the sums over a set of g * gain, and of that times x - center.
    DxTerms<A> dx_terms(int64_t set, Pair<double> sums) const {
        DxTerms<A> terms{center(set), inverse(set), 0, 0};
        if (!coupled) return terms;
        double inverse = terms.inverse, k = plan.guard == NK_INSIDE ? full_strength : strength<A>(plan, terms.inverse);
        if (k != 0) terms.along = A(-k * inverse * inverse * inverse * sums.gx);
        if (plan.centred) terms.shift = A(-inverse * sums.g * share);
        return terms;
    }

    // Gradients behind the activation: dy times its slope.
    void prepare(const Stretch &s, int64_t offset, int64_t n, int64_t set, A *to) const {
        const A *gain = along(call.weight, s.parameter), *bias = along(call.bias, s.parameter);
        A scale = inverse(set), low = 0;
        if (!runs.vector) scale *= gain ? *gain : A(1), low = bias ? -*bias : A(0);
        int64_t step = runs.vector ? offset : 0;
        A least = -std::numeric_limits<A>::infinity();
        auto map = mapper<A, T, false>(runs.vector && gain, runs.vector && bias);
        map(call.x + s.x + offset, to, n, center(set), scale, low, least, along(gain, step), along(bias, step), 0);
        slope_run<A>(plan.activation, to, n);
        const T *dy = call.dy + s.x + offset;
        auto passed = [](Vec<A> slope, Vec<A> g) { return select<A>(slope == 0, Vec<A>{}, slope * g); };
        over(n, [&](auto at) { at.put(to, passed(at(static_cast<const A *>(to)), at(dy))); });
    }

    // Where a set's prepared gradients are: all of them, or those of one stretch.
    struct Prepared {
        alignas(64) A values[HELD];
        bool all = false;
    };

    // each(g, offset, n) for the gradients of a stretch.
    template <class Each> void gradients(const Stretch &s, int64_t set, Prepared &prepared, Each &&each) const {
        if (!curved) return each(call.dy + s.x, 0, s.n);
        if (runs.size() <= HELD) {
            if (!prepared.all) prepare(s, 0, s.n, set, prepared.values + s.index);
            return each(static_cast<const A *>(prepared.values + s.index), 0, s.n);
        }
        for (int64_t i = 0; i < s.n; i += PIECE) {
            int64_t n = std::min(PIECE, s.n - i);
            prepare(s, i, n, set, prepared.values);
            each(static_cast<const A *>(prepared.values), i, n);
        }
    }
};

// Where the gain varies along runs; segments_backward.cpp has the other case.
template <class T> void segments_backward_varying(const NkPlan &plan, const Backward<T> &call);

}  // namespace nk
