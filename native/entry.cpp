// nk_forward and nk_backward: pointers are checked and types told apart, and weights come to the kernels in the accumulation type.
#include "activation.h"
#include "kernels.h"
#include "plan.h"
#include "room.h"
#include "statistic.h"
#include "typed.h"

namespace nk {
namespace {

int64_t elements(const NkPlan &plan) { return plan.outer * plan.kept * set_size(plan); }

bool agree(const NkPlan &plan, const void *weight, const void *bias) {
    return agrees(plan.parts, NK_WEIGHT, weight) && agrees(plan.parts, NK_BIAS, bias);
}

template <class A> constexpr int32_t type_of = sizeof(A) == 8 ? NK_FLOAT64 : NK_FLOAT32;

// Sets `values` to the parameter in the accumulation type with the offset added: itself where it is that already, else a copy in `room`.
template <class A> NkStatus widen_into(Room<A> &room, const NkPlan &plan, const void *parameter, double offset, const A *&values) {
    if (parameter == nullptr) return NK_OK;
    if (plan.parameter_type == type_of<A> && offset == 0) {
        values = static_cast<const A *>(parameter);
        return NK_OK;
    }
    A *to = room.take(plan.parameters);
    values = to;
    return by_type(plan.parameter_type, [&](auto p) {
        auto from = static_cast<const decltype(p) *>(parameter);
        for (int64_t i = 0; i < plan.parameters; ++i) to[i] = A(widen(from[i])) + A(offset);
    });
}

// Where a parameter's gradient is summed up: in the caller's own memory where that is of the accumulation type.
template <class A> A *sums_of(Room<A> &room, const NkPlan &plan, void *gradient) {
    if (gradient == nullptr) return nullptr;
    return plan.parameter_type == type_of<A> ? static_cast<A *>(gradient) : room.take(plan.parameters);
}
template <class A> NkStatus narrow_into(void *gradient, const NkPlan &plan, const A *sums) {
    if (gradient == nullptr || gradient == sums) return NK_OK;
    return by_type(plan.parameter_type, [&](auto p) {
        using P = decltype(p);
        for (int64_t i = 0; i < plan.parameters; ++i) static_cast<P *>(gradient)[i] = narrow<P>(accumulator<P>(sums[i]));
    });
}

template <class T>
NkStatus forward(const NkPlan &plan, const void *x, const void *residual, const void *weight, const void *bias, void *y, void *sum,
                 void *center, void *inverse, void *variance) {
    using A = accumulator<T>;
    Room<A> weight_room, bias_room;
    Forward<T> call{static_cast<const T *>(x), static_cast<const T *>(residual), nullptr, nullptr, static_cast<T *>(y),
                    static_cast<T *>(sum), static_cast<A *>(center), static_cast<A *>(inverse), static_cast<A *>(variance)};
    NkStatus status = widen_into(weight_room, plan, weight, plan.offset, call.weight);
    if (status == NK_OK) status = widen_into(bias_room, plan, bias, 0, call.bias);
    if (status != NK_OK) return status;
    run_forward<T>(plan, call);
    return NK_OK;
}

template <class T>
NkStatus backward(const NkPlan &plan, const void *dy, const void *dsum, const void *x, const void *weight, const void *bias,
                  const void *center, const void *inverse, void *dx, void *dweight, void *dbias) {
    using A = accumulator<T>;
    Room<A> weight_room, bias_room, dweight_room, dbias_room;
    Backward<T> call{static_cast<const T *>(dy),     static_cast<const T *>(dsum),          static_cast<const T *>(x), nullptr, nullptr,
                     static_cast<const A *>(center), static_cast<const A *>(inverse),       static_cast<T *>(dx),
                     sums_of(dweight_room, plan, dweight), sums_of(dbias_room, plan, dbias), plan.activation};
    if (plan.parts & NK_OUTPUT) call.kind = plan.activation == NK_LEAKY_RELU ? LEAKY_OUTPUT : OUTPUT;
    NkStatus status = widen_into(weight_room, plan, weight, plan.offset, call.weight);
    if (status == NK_OK) status = widen_into(bias_room, plan, bias, 0, call.bias);
    if (status != NK_OK) return status;
    if (elements(plan) == 0) {
        // Sums of nothing are still to be written.
        for (A *sums : {call.dweight, call.dbias})
            if (sums != nullptr) std::fill_n(sums, plan.parameters, A(0));
    } else {
        run_backward<T>(plan, call);
    }
    status = narrow_into(dweight, plan, call.dweight);
    return status == NK_OK ? narrow_into(dbias, plan, call.dbias) : status;
}

}  // namespace
}  // namespace nk

NK_EXPORT int32_t nk_forward(const NkPlan *plan, const void *x, const void *residual, const void *weight, const void *bias, void *y,
                             void *sum, void *center, void *inverse, void *variance) {
    using namespace nk;
    return guarded([&]() -> NkStatus {
        if (!agree(*plan, weight, bias)) return NK_NULL;
        if (elements(*plan) == 0) return NK_OK;
        if (any_null(x, y) || (residual == nullptr) != (sum == nullptr)) return NK_NULL;
        if (plan->given && (inverse == nullptr || residual != nullptr)) return NK_NULL;
        return by_type(plan->type, [&](auto t) {
            return forward<decltype(t)>(*plan, x, residual, weight, bias, y, sum, center, inverse, variance);
        });
    });
}

// The statistics alone.
NK_EXPORT int32_t nk_measure(const NkPlan *plan, const void *x, void *center, void *inverse, void *variance) {
    using namespace nk;
    return guarded([&]() -> NkStatus {
        if (elements(*plan) == 0) return NK_OK;
        if (any_null(x, center, inverse, variance) || plan->given) return NK_NULL;
        return by_type(plan->type, [&](auto t) {
            return forward<decltype(t)>(*plan, x, nullptr, nullptr, nullptr, nullptr, nullptr, center, inverse, variance);
        });
    });
}

NK_EXPORT int32_t nk_backward(const NkPlan *plan, const void *dy, const void *dsum, const void *x, const void *weight, const void *bias,
                              const void *center, const void *inverse, void *dx, void *dweight, void *dbias) {
    using namespace nk;
    return guarded([&]() -> NkStatus {
        if (!agree(*plan, weight, bias)) return NK_NULL;
        if (elements(*plan) > 0 && any_null(dy, x, inverse)) return NK_NULL;
        if (elements(*plan) > 0 && center == nullptr && plan->centred && !plan->given) return NK_NULL;
        return by_type(plan->type, [&](auto t) {
            return backward<decltype(t)>(*plan, dy, dsum, x, weight, bias, center, inverse, dx, dweight, dbias);
        });
    });
}
