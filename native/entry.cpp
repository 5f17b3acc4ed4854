// What Python calls: types are told apart here, and weights come to the kernels in the accumulation type.
#include <cstddef>
#include <memory>
#include <new>

#include "kernels.h"
#include "plan.h"
#include "statistic.h"
#include "vector.h"

namespace nk {
namespace {

enum Status : int32_t { NK_OK = 0, NK_NO_MEMORY = 1, NK_UNKNOWN_TYPE = 2 };

// Pieces shorter than this are read as lanes, many at a time: the first where parameters lie as the lanes do, the second where none vary.
constexpr int64_t SHORT = 64 * LANES, SHORT_PLAIN = 16 * LANES;

bool in_lanes(const NkPlan &plan) {
    int64_t piece = plan.mid * plan.inner;
    if (plan.far == 1) return false;
    bool alike = plan.per_inner == 1 || piece == 1;
    bool constant = plan.per_kept == 0 && plan.per_mid == 0 && plan.per_inner == 0;
    return (alike && piece < SHORT) || (constant && piece < SHORT_PLAIN);
}

template <class A> std::unique_ptr<A[]> room(int64_t elements) {
    return std::unique_ptr<A[]>(elements > 0 ? new A[std::size_t(elements)] : nullptr);
}

template <class P, class A> void widen_all(const P *from, A *to, int64_t n, A offset) {
    for (int64_t i = 0; i < n; ++i) to[i] = A(widen(from[i])) + offset;
}

// The parameter in the accumulation type with the offset added: itself where it is that already.
template <class A> struct Widened {
    std::unique_ptr<A[]> own;
    const A *values = nullptr;

    Widened(const NkPlan &plan, const void *parameter, double offset) {
        if (parameter == nullptr) return;
        constexpr int32_t same = sizeof(A) == 8 ? NK_FLOAT64 : NK_FLOAT32;
        if (plan.parameter_type == same && offset == 0) {
            values = static_cast<const A *>(parameter);
            return;
        }
        own = room<A>(plan.parameters);
        values = own.get();
        switch (plan.parameter_type) {
            case NK_FLOAT32: widen_all(static_cast<const float *>(parameter), own.get(), plan.parameters, A(offset)); break;
            case NK_FLOAT64: widen_all(static_cast<const double *>(parameter), own.get(), plan.parameters, A(offset)); break;
            case NK_BFLOAT16: widen_all(static_cast<const bfloat16 *>(parameter), own.get(), plan.parameters, A(offset)); break;
            case NK_FLOAT16: widen_all(static_cast<const float16 *>(parameter), own.get(), plan.parameters, A(offset)); break;
        }
    }
};

template <class A, class P> void narrow_all(const A *from, void *to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) static_cast<P *>(to)[i] = narrow<P>(accumulator<P>(from[i]));
}

// Room for a parameter's gradient in the accumulation type: the caller's own where it is of that type.
template <class A> struct Narrowed {
    const NkPlan &plan;
    void *wanted;
    std::unique_ptr<A[]> own;
    A *values = nullptr;

    Narrowed(const NkPlan &plan, void *wanted) : plan(plan), wanted(wanted) {
        if (wanted == nullptr) return;
        if (plan.parameter_type == (sizeof(A) == 8 ? NK_FLOAT64 : NK_FLOAT32)) {
            values = static_cast<A *>(wanted);
        } else {
            own = room<A>(plan.parameters);
            values = own.get();
        }
    }
    void deliver() {
        if (own == nullptr) return;
        switch (plan.parameter_type) {
            case NK_FLOAT32: narrow_all<A, float>(values, wanted, plan.parameters); break;
            case NK_FLOAT64: narrow_all<A, double>(values, wanted, plan.parameters); break;
            case NK_BFLOAT16: narrow_all<A, bfloat16>(values, wanted, plan.parameters); break;
            case NK_FLOAT16: narrow_all<A, float16>(values, wanted, plan.parameters); break;
        }
    }
};

template <class T>
void forward(const NkPlan &plan, const void *x, const void *residual, const void *weight, const void *bias, void *y, void *sum, void *center,
             void *inverse, void *variance) {
    using A = accumulator<T>;
    Widened<A> gain(plan, weight, plan.offset), shift(plan, bias, 0);
    bool lanes = in_lanes(plan);
    auto scratch = room<A>(lanes ? lanes_scratch(plan, false) : segments_scratch(plan, false));
    Forward<T> call{static_cast<const T *>(x), static_cast<const T *>(residual), gain.values, shift.values, static_cast<T *>(y),
                    static_cast<T *>(sum), static_cast<A *>(center), static_cast<A *>(inverse), static_cast<A *>(variance), scratch.get()};
    lanes ? lanes_forward<T>(plan, call) : segments_forward<T>(plan, call);
}

template <class T>
void backward(const NkPlan &plan, const void *dy, const void *dsum, const void *x, const void *weight, const void *bias, const void *center,
              const void *inverse, void *dx, void *dweight, void *dbias) {
    using A = accumulator<T>;
    Widened<A> gain(plan, weight, plan.offset), shift(plan, bias, 0);
    Narrowed<A> dgain(plan, dweight), dshift(plan, dbias);
    bool lanes = in_lanes(plan);
    auto scratch = room<A>(lanes ? lanes_scratch(plan, true) : segments_scratch(plan, true));
    Backward<T> call{static_cast<const T *>(dy), static_cast<const T *>(dsum), static_cast<const T *>(x), gain.values, shift.values,
                     static_cast<const A *>(center), static_cast<const A *>(inverse), static_cast<T *>(dx), dgain.values, dshift.values,
                     scratch.get()};
    lanes ? lanes_backward<T>(plan, call) : segments_backward<T>(plan, call);
    dgain.deliver();
    dshift.deliver();
}

// run(T{}) for the type's C++ twin; exceptions must not reach Python.
template <class Run> int32_t typed(int32_t type, Run &&run) try {
    switch (type) {
        case NK_FLOAT32: run(float{}); return NK_OK;
        case NK_FLOAT64: run(double{}); return NK_OK;
        case NK_BFLOAT16: run(bfloat16{}); return NK_OK;
        case NK_FLOAT16: run(float16{}); return NK_OK;
    }
    return NK_UNKNOWN_TYPE;
} catch (const std::bad_alloc &) {
    return NK_NO_MEMORY;
}

}  // namespace
}  // namespace nk

NK_EXPORT int32_t nk_forward(const NkPlan *plan, const void *x, const void *residual, const void *weight, const void *bias, void *y,
                             void *sum, void *center, void *inverse, void *variance) {
    return nk::typed(plan->type, [&](auto t) {
        nk::forward<decltype(t)>(*plan, x, residual, weight, bias, y, sum, center, inverse, variance);
    });
}

NK_EXPORT int32_t nk_backward(const NkPlan *plan, const void *dy, const void *dsum, const void *x, const void *weight, const void *bias,
                              const void *center, const void *inverse, void *dx, void *dweight, void *dbias) {
    return nk::typed(plan->type, [&](auto t) {
        nk::backward<decltype(t)>(*plan, dy, dsum, x, weight, bias, center, inverse, dx, dweight, dbias);
    });
}

// 1 / scale and centre of each set from a given variance and mean of `type`, where the sets are the channels.
NK_EXPORT int32_t nk_given(const NkPlan *plan, int64_t type, const void *mean, const void *variance, void *inverse, void *center) {
    NkPlan of_variance = *plan;
    of_variance.scale = plan->scale == NK_UNSCALED ? NK_UNSCALED : NK_SUM_SQUARE;
    auto fill = [&](auto a, auto t) {
        using A = decltype(a);
        auto m = static_cast<const decltype(t) *>(mean), v = static_cast<const decltype(t) *>(variance);
        for (int64_t k = 0; k < plan->kept; ++k) {
            static_cast<A *>(inverse)[k] = nk::inverse_scale<A>(of_variance, v == nullptr ? A(0) : A(nk::widen(v[k])));
            static_cast<A *>(center)[k] = A(nk::widen(m[k]));
        }
    };
    return nk::typed(int32_t(type), [&](auto t) { plan->type == NK_FLOAT64 ? fill(double{}, t) : fill(float{}, t); });
}

// Running statistics of one training batch: running <- (1 - momentum) running + momentum new, left as they are where the new ones are not
// finite. The new variance is variance * factor; `moments` keeps E[x^2] in place of an average of variances. The new ones are of `type`,
// the running ones of `running_type`.
NK_EXPORT int32_t nk_remember(int64_t channels, int64_t type, int64_t running_type, double momentum, double factor, int64_t moments,
                              const void *mean, const void *variance, void *running_mean, void *running_variance) {
    if (type != NK_FLOAT32 && type != NK_FLOAT64) return nk::NK_UNKNOWN_TYPE;
    return nk::typed(int32_t(running_type), [&](auto r) {
        using R = decltype(r);
        using A = nk::accumulator<R>;
        auto rm = static_cast<R *>(running_mean), rv = static_cast<R *>(running_variance);
        A weight = A(momentum);
        auto fresh = [&](const void *from, int64_t c) {
            return type == NK_FLOAT32 ? A(static_cast<const float *>(from)[c]) : A(static_cast<const double *>(from)[c]);
        };
        for (int64_t c = 0; c < channels; ++c) {
            A m = fresh(mean, c), v = fresh(variance, c) * A(factor), old_mean = nk::widen(rm[c]), old_variance = nk::widen(rv[c]);
            if (!std::isfinite(m) || !std::isfinite(v)) continue;
            A change = m - old_mean;
            A mixed = old_variance + weight * (v - old_variance) + (moments ? weight * (1 - weight) * change * change : A(0));
            rm[c] = nk::narrow<R>(old_mean + weight * change);
            rv[c] = nk::narrow<R>(mixed);
        }
    });
}
