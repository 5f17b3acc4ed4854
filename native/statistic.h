// Moments of a set, how two sets merge, and what a statistic makes of them.
#pragma once
#include <cmath>

#include "plan.h"

namespace nk {

// Mean and sum of squared differences from it, of n elements. Without centring, mean stays 0 and square is the sum of squares.
template <class A> struct Moments {
    A n = 0, mean = 0, square = 0;
};

// Chan, Golub, LeVeque 1979. Merged in a fixed order, the result does not depend on the threads.
template <class A> inline Moments<A> merge(Moments<A> a, Moments<A> b) {
    if (a.n == 0) return b;
    if (b.n == 0) return a;
    A n = a.n + b.n, apart = b.mean - a.mean;
    return {n, a.mean + apart * (b.n / n), a.square + b.square + apart * apart * (a.n * (b.n / n))};
}

inline int64_t set_size(const NkPlan &plan) { return plan.far * plan.mid * plan.inner; }

// 1 / scale, from the sum of squares (about the mean where the rule centres).
template <class A> inline A inverse_scale(const NkPlan &plan, A square) {
    if (plan.scale == NK_UNSCALED) return 1;
    A divisor = plan.scale == NK_MEAN_SQUARE ? A(set_size(plan) - plan.correction) : A(1);
    A found = square / divisor, eps = A(plan.eps);
    if (plan.guard == NK_INSIDE) return 1 / std::sqrt(found + eps);
    A root = std::sqrt(found);
    return 1 / (plan.guard == NK_OUTSIDE ? root + eps : (root < eps ? eps : root));
}

// The k of dx = inverse * (g - mean(g) - k * normalized * sum(g * normalized)), g the gradient of what is normalized.
template <class A> inline A strength(const NkPlan &plan, A inverse) {
    if (plan.given || plan.scale == NK_UNSCALED) return 0;
    A k = plan.scale == NK_MEAN_SQUARE ? 1 / A(set_size(plan) - plan.correction) : A(1);
    A eps = A(plan.eps);
    if (plan.guard == NK_FLOOR) return inverse < 1 / eps ? k : A(0);
    if (plan.guard == NK_OUTSIDE) {
        A rest = 1 - eps * inverse;
        return rest > 0 ? k / rest : A(0);  // where the scale is eps alone, what this multiplies is zero too
    }
    return k;
}

inline int64_t outer_place(const NkPlan &plan, int64_t o) { return o / plan.outer_div % plan.outer_mod * plan.outer_step; }

}  // namespace nk
