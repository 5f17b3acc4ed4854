// The two families of loops behind every rule, and what they are called with.
#pragma once
#include "plan.h"
#include "vector.h"

namespace nk {

// Pointers of a forward pass.
template <class T> struct Forward {
    using A = accumulator<T>;
    const T *x;
    const T *residual;  // or null; added to x first: then sum receives x + residual, rounded to T, and is what is normalized
    const A *weight;    // gain: already offset + weight, in the accumulation type; or null
    const A *bias;      // or null
    T *y;         // or null, where statistics alone are wanted
    T *sum;       // null as residual is
    A *center;    // per statistic, or null; read where plan.given
    A *inverse;   // per statistic: 1 / scale, or null; read where plan.given, and then there
    A *variance;  // per statistic: population variance; or null
};

// y = activation(gain * (x - center) * inverse + bias).
template <class T> struct Backward {
    using A = accumulator<T>;
    const T *dy;
    const T *dsum;       // what reaches x + residual from elsewhere, is added to dx; or null
    const T *x;          // what was normalized: the sum, where there was a residual; or y, where kind is of an output
    const A *weight;     // gain, or null
    const A *bias;       // or null; read only for the derivative of the activation
    const A *center;     // or null, where the rule does not centre
    const A *inverse;
    T *dx;               // or null
    A *dweight, *dbias;  // of plan.parameters elements, overwritten; or null
    int32_t kind = 0;    // the activation; or OUTPUT or LEAKY_OUTPUT
};

// row and block: each set is far pieces of mid * inner elements next to one another.
template <class T> void segments_forward(const NkPlan &plan, const Forward<T> &call);
template <class T> void segments_backward(const NkPlan &plan, const Backward<T> &call);

// column, and block with short pieces: kept * mid * inner lanes next to one another, far apart.
template <class T> void lanes_forward(const NkPlan &plan, const Forward<T> &call);
template <class T> void lanes_backward(const NkPlan &plan, const Backward<T> &call);

// Pieces shorter than this are read as lanes, many at a time: per piece the segments' kernels pay a sum over a vector's lanes and a tail.
// The first holds where parameters lie as the lanes do, and need no table; the second where none vary; the third where a piece has one.
constexpr int64_t SHORT = 64 * LANES, SHORT_PLAIN = 16 * LANES, SHORT_ONE = 64;

inline bool in_lanes(const NkPlan &plan) {
    int64_t piece = plan.mid * plan.inner;
    if (plan.far == 1) return false;
    bool alike = plan.per_inner == 1 || piece == 1;
    bool one = plan.per_mid == 0 && plan.per_inner == 0, constant = one && plan.per_kept == 0;
    return (alike && piece < SHORT) || (constant && piece < SHORT_PLAIN) || (one && piece < SHORT_ONE && plan.far >= 16);
}

template <class T> void run_forward(const NkPlan &plan, const Forward<T> &call) {
    in_lanes(plan) ? lanes_forward<T>(plan, call) : segments_forward<T>(plan, call);
}
template <class T> void run_backward(const NkPlan &plan, const Backward<T> &call) {
    in_lanes(plan) ? lanes_backward<T>(plan, call) : segments_backward<T>(plan, call);
}

}  // namespace nk
