// Activations that follow a normalization, and their derivatives, on vectors: float to a few units in the last place, double by <cmath>.
//
// The exponentials are of negative numbers only, and no 1 - (nearly 1) is formed: the tails of SiLU and GELU keep their relative accuracy.
// NaN gives NaN. As in torch, the curved ones give NaN at -Inf.
#pragma once
#include <type_traits>

#include "plan.h"
#include "twin.h"

namespace nk {
namespace curve {

using lanes::F32;
using lanes::F64;
using lanes::I32;
using lanes::U32;

template <class F> inline F64 each(F64 z, F f) {
    for (int i = 0; i < LANES; ++i) z[i] = f(z[i]);
    return z;
}
inline F32 absolute(F32 z) { return reinterpret_cast<F32>(reinterpret_cast<I32>(z) & 0x7fffffff); }
inline F64 absolute(F64 z) { return z < 0 ? -z : z; }

// A NaN stays, which a minimum instruction would not promise.
template <class A> inline Vec<A> at_most(Vec<A> z, A limit) { return select<A>(z > limit, splat<A>(limit), z); }

// exp(-(a + rest)) for a >= 0 and a small rest, with results down to the smallest subnormal.
inline F32 decay(F32 a, F32 rest) {
    a = at_most<float>(a, 104.0f);
    F32 shifted = a * -1.44269504088896341f + 12582912.0f;  // rounds to an integer in the low bits: 1.5 * 2^23
    F32 whole = shifted - 12582912.0f;
    F32 r = (-a - whole * 0.693359375f) + whole * 2.12194440e-4f - rest;  // ln 2 in two parts, the first times whole is exact
    F32 series = ((((0.0013795232539616249f * r + 0.008378096990625274f) * r + 0.04166941680498941f) * r + 0.16666433176232384f) * r +
                  0.4999998675095297f) *
                     (r * r) +
                 r + 1.0f;
    // 2^(whole + 64): normal for every whole from -150. Unsigned, as lanes behind the end of a run may hold anything.
    U32 power = (reinterpret_cast<U32>(shifted) << 23) + ((127u + 64u) << 23);
    return series * reinterpret_cast<F32>(power) * 5.42101086242752217e-20f;
}
inline F32 decay(F32 a) { return decay(a, F32{}); }
inline F64 decay(F64 a) {
    return each(a, [](double v) { return std::exp(-v); });
}

// The logistic function and its complement.
template <class A> struct Logistic {
    Vec<A> value, rest;
};
template <class A> inline Logistic<A> logistic(Vec<A> z) {
    Vec<A> small = decay(absolute(z)), one = splat<A>(1);
    Vec<A> larger = one / (one + small), smaller = small * larger;
    Mask<A> negative = z < 0;
    return {select<A>(negative, smaller, larger), select<A>(negative, larger, smaller)};
}

// The normal distribution's Phi(z) and exp(-z^2 / 2).
template <class A> struct Normal {
    Vec<A> below, bell;
};
inline Normal<float> normal(F32 z) {
    F32 a = at_most<float>(absolute(z), 15.0f);
    F32 high = reinterpret_cast<F32>(reinterpret_cast<I32>(a) & ~0xfff);  // its square is exact
    F32 bell = decay(0.5f * (high * high), 0.5f * ((a - high) * (a + high)));
    // Phi(-a) / bell, smooth and slow, in powers of w.
    F32 w = (a - 3.0f) / (a + 3.0f);
    F32 tail = 5.267642787735004e-05f * w + 0.0001145045951884937f;
    tail = tail * w - 0.00033854593036091216f;
    tail = tail * w - 0.0009828224077213607f;
    tail = tail * w + 0.0029042136833103845f;
    tail = tail * w + 0.006131811273757395f;
    tail = tail * w - 0.046213234471013144f;
    tail = tail * w + 0.12322505227447683f;
    tail = tail * w - 0.20640262191440936f;
    tail = (tail * w + 0.1215139473911837f) * bell;
    return {select<float>(z < 0, tail, 1.0f - tail), bell};
}
inline Normal<double> normal(F64 z) {
    return {each(z, [](double v) { return 0.5 * std::erfc(v * -0.70710678118654752440); }),
            each(z, [](double v) { return std::exp(-0.5 * v * v); })};
}

// Twice the argument of the tanh of the approximate GELU; beyond 16 the tanh is 1 and the cube would overflow.
template <class A> inline Vec<A> held(Vec<A> z) { return select<A>(z < A(-16), splat<A>(-16), at_most<A>(z, A(16))); }
template <class A> inline Vec<A> cubic(Vec<A> z) { return A(1.59576912160573071176) * z * (A(1) + A(0.044715) * z * z); }
template <class A> inline Vec<A> cubic_slope(Vec<A> z) { return A(1.59576912160573071176) * (A(1) + A(3 * 0.044715) * z * z); }

}  // namespace curve

constexpr double LEAK = 0.01;  // the slope of the leaky ReLU below zero

// In an activation's place where the backward pass is given the output: behind none, or behind a leaky ReLU.
constexpr int OUTPUT = -2, LEAKY_OUTPUT = -3;

// From an output y: what the activation was given, and what passes it of a gradient g.
template <int KIND, class A, class V> inline __attribute__((always_inline)) V undone(const V &y) {
    if constexpr (KIND == LEAKY_OUTPUT) return y + (at_least(y, Vec<A>{}) - y) * splat<A>(A(1 - 1 / LEAK));
    return y;
}
template <int KIND, class A, class V> inline __attribute__((always_inline)) V passed(const V &y, const V &g) {
    if constexpr (KIND == LEAKY_OUTPUT) return where_positive(y, g) * splat<A>(A(1 - LEAK)) + g * splat<A>(A(LEAK));
    return g;
}

// activation(z), of the kind NkActivation.
template <int32_t KIND, class A> inline Vec<A> activate(Vec<A> z) {
    if constexpr (KIND == NK_RELU) return select<A>(z < 0, Vec<A>{}, z);
    if constexpr (KIND == NK_LEAKY_RELU) return select<A>(z < 0, z * A(LEAK), z);
    if constexpr (KIND == NK_SILU) return z * curve::logistic<A>(z).value;
    if constexpr (KIND == NK_GELU) return z * curve::normal(z).below;
    if constexpr (KIND == NK_GELU_TANH) return z * curve::logistic<A>(curve::cubic<A>(curve::held<A>(z))).value;
    return z;
}

// Its derivative. Of ReLU at 0: 0.
template <int32_t KIND, class A> inline Vec<A> slope(Vec<A> z) {
    if constexpr (KIND == NK_RELU) return select<A>(z <= 0, Vec<A>{}, splat<A>(1));
    if constexpr (KIND == NK_LEAKY_RELU) return select<A>(z <= 0, splat<A>(A(LEAK)), splat<A>(1));
    if constexpr (KIND == NK_SILU) {
        auto gate = curve::logistic<A>(z);
        return gate.value * (A(1) + z * gate.rest);
    }
    if constexpr (KIND == NK_GELU) {
        auto found = curve::normal(z);
        return found.below + A(0.39894228040143267794) * z * found.bell;
    }
    if constexpr (KIND == NK_GELU_TANH) {
        Vec<A> inner = curve::held<A>(z);
        auto gate = curve::logistic<A>(curve::cubic<A>(inner));
        return gate.value * (A(1) + inner * curve::cubic_slope<A>(inner) * gate.rest);
    }
    return splat<A>(1);
}

// f(kind as a compile-time constant): the switch outside a loop.
template <class F> inline void with_activation(int32_t kind, F &&f) {
    switch (kind) {
        case NK_RELU: return f(std::integral_constant<int32_t, NK_RELU>{});
        case NK_LEAKY_RELU: return f(std::integral_constant<int32_t, NK_LEAKY_RELU>{});
        case NK_SILU: return f(std::integral_constant<int32_t, NK_SILU>{});
        case NK_GELU: return f(std::integral_constant<int32_t, NK_GELU>{});
        case NK_GELU_TANH: return f(std::integral_constant<int32_t, NK_GELU_TANH>{});
        default: return f(std::integral_constant<int32_t, NK_LINEAR>{});
    }
}

// In place over a run in the cache, so that a kernel need not be compiled once a kind. z has room for whole vectors.
template <class A> __attribute__((noinline)) void activate_run(int32_t kind, A *z, int64_t n) {
    with_activation(kind, [&](auto constant) {
        for (int64_t i = 0; i < n; i += LANES) store(z + i, activate<decltype(constant)::value, A>(load(z + i)));
    });
}
template <class A> __attribute__((noinline)) void slope_run(int32_t kind, A *z, int64_t n) {
    with_activation(kind, [&](auto constant) {
        for (int64_t i = 0; i < n; i += LANES) store(z + i, slope<decltype(constant)::value, A>(load(z + i)));
    });
}

}  // namespace nk
