// Moments of a set, how two sets merge, and what a statistic makes of them.
#pragma once
#include <algorithm>
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

// 1 / scale of n sets, from their sums of squares (about the mean where the rule centres). In double and rounded once: four roundings in
// float would cost as much as all sums do. The choices stand outside the loops, so that these are vectorized.
template <class A, class S> inline void inverse_scales(const NkPlan &plan, const S *square, A *inverse, int64_t n) {
    if (plan.scale == NK_UNSCALED) {
        std::fill_n(inverse, n, A(1));
        return;
    }
    const double share = plan.scale == NK_MEAN_SQUARE ? 1 / double(set_size(plan) - plan.correction) : 1, eps = plan.eps;
    switch (plan.guard) {
        case NK_INSIDE:
            for (int64_t i = 0; i < n; ++i) inverse[i] = A(1 / std::sqrt(double(square[i]) * share + eps));
            return;
        case NK_OUTSIDE:
            for (int64_t i = 0; i < n; ++i) inverse[i] = A(1 / (std::sqrt(double(square[i]) * share) + eps));
            return;
        default:
            // At the floor exactly what strength() knows the floor by.
            for (int64_t i = 0; i < n; ++i) {
                double root = std::sqrt(double(square[i]) * share);
                inverse[i] = root < eps ? 1 / A(eps) : A(1 / root);
            }
    }
}
template <class A> inline A inverse_scale(const NkPlan &plan, double square) {
    A inverse;
    inverse_scales<A>(plan, &square, &inverse, 1);
    return inverse;
}

// Sums of squares in float are right between these bounds; beyond, squares leave the range of float, and a set is read once more in double.
// Where eps hides so small a sum, and in double, there is no lower bound.
struct Range {
    double least, most;
    template <class A> static Range of(const NkPlan &plan, int64_t n) {
        if (sizeof(A) == 8 || plan.scale == NK_UNSCALED) return {0, INFINITY};
        double hides = plan.guard == NK_INSIDE ? plan.eps : plan.eps * plan.eps;
        return {hides < 1e-23 ? double(n) * 1e-30 : 0, 3e38};
    }
    // A NaN is nowhere outside; all zeros are read again, which are rare.
    bool lacks(double square) const { return square < least || square > most; }
};

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
