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

// Pieces shorter than this are read as lanes, many at a time.
constexpr int64_t SHORT = 4 * LANES;

bool in_lanes(const NkPlan &plan) {
    int64_t piece = plan.mid * plan.inner;
    if (plan.far == 1 || piece >= SHORT) return false;
    // The lanes want parameters that lie as they do, or do not vary along them.
    bool alike = plan.per_inner == 1 || piece == 1;
    bool constant = plan.per_kept == 0 && plan.per_mid == 0 && plan.per_inner == 0;
    return alike || constant;
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

// Running statistics of one training batch: running <- (1 - momentum) running + momentum new, left as they are where the new ones are not
// finite. `unbiased` is n / (n - 1), or 1 where the population variance is kept; `moments` keeps E[x^2] in place of an average of variances.
NK_EXPORT int32_t nk_remember(int64_t channels, int64_t type, double momentum, double unbiased, int64_t moments, const void *mean,
                              const void *variance, void *running_mean, void *running_variance) {
    auto update = [&](auto a) {
        using A = decltype(a);
        auto m = static_cast<const A *>(mean), v = static_cast<const A *>(variance);
        auto rm = static_cast<A *>(running_mean), rv = static_cast<A *>(running_variance);
        A weight = A(momentum), scale = A(unbiased);
        for (int64_t c = 0; c < channels; ++c) {
            A fresh = v[c] * scale;
            if (!std::isfinite(m[c]) || !std::isfinite(fresh)) continue;
            A change = m[c] - rm[c];
            rm[c] += weight * change;
            rv[c] += weight * (fresh - rv[c]);
            if (moments) rv[c] += weight * (1 - weight) * change * change;
        }
    };
    if (type == NK_FLOAT32) update(float{});
    else if (type == NK_FLOAT64) update(double{});
    else return nk::NK_UNKNOWN_TYPE;
    return nk::NK_OK;
}
