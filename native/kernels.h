// The two loops behind every rule, and what they are called with.
#pragma once
#include "plan.h"
#include "vector.h"

namespace nk {

// Pointers of a forward pass; those marked ? may be null.
template <class T> struct Forward {
    using A = accumulator<T>;
    const T *x;
    const T *residual;  // ? added to x first; then sum receives x + residual, rounded to T, and is what is normalized
    const A *weight;    // ? gain: already offset + weight, in the accumulation type
    const A *bias;      // ?
    T *y;
    T *sum;       // ? goes with residual
    A *center;    // ? per statistic; read where plan.given
    A *inverse;   // per statistic: 1 / scale; read where plan.given
    A *variance;  // ? per statistic: population variance
    A *scratch;
};

// y = activation(gain * (x - center) * inverse + bias).
template <class T> struct Backward {
    using A = accumulator<T>;
    const T *dy;
    const T *dsum;      // ? what reaches x + residual from elsewhere; is added to dx
    const T *x;         // what was normalized: the sum, where there was a residual
    const A *weight;    // ? gain
    const A *bias;      // ? read only for the derivative of the activation
    const A *center;    // ? null where the rule does not centre
    const A *inverse;
    T *dx;              // ?
    A *dweight, *dbias;  // ? of plan.parameters elements, overwritten
    A *scratch;
};

// row and block: each set is far pieces of mid * inner elements next to one another.
template <class T> void segments_forward(const NkPlan &plan, const Forward<T> &call);
template <class T> void segments_backward(const NkPlan &plan, const Backward<T> &call);
int64_t segments_scratch(const NkPlan &plan, bool backward);  // elements of the accumulation type

// column, and block with short pieces: kept * mid * inner lanes next to one another, far apart.
template <class T> void lanes_forward(const NkPlan &plan, const Forward<T> &call);
template <class T> void lanes_backward(const NkPlan &plan, const Backward<T> &call);
int64_t lanes_scratch(const NkPlan &plan, bool backward);

}  // namespace nk
