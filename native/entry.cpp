// nk_forward and nk_backward: pointers are checked and types told apart, and weights come to the kernels in the accumulation type.
#include "activation.h"
#include "kernels.h"
#include "plan.h"
#include "room.h"
#include "row.h"
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

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Rows of y as whole numbers from -127 to 127 and a scale each; of a row with a NaN or infinity the scale says so. A few rows of y at a time.
template <class T> NkStatus quantize(const NkPlan &plan, const void *x, const void *weight, const void *bias, int8_t *q, float *scale) {
    using A = accumulator<T>;
    Room<A> weight_room, bias_room;
    Forward<T> call{};
    NkStatus status = widen_into(weight_room, plan, weight, plan.offset, call.weight);
    if (status == NK_OK) status = widen_into(bias_room, plan, bias, 0, call.bias);
    const int64_t d = set_size(plan), together = std::max<int64_t>(1, 4096 / d);
    for_each(status == NK_OK ? (plan.outer + together - 1) / together : 0, [&](int64_t task) {
        int64_t first = task * together;
        NkPlan part = plan;
        part.outer = std::min(together, plan.outer - first), part.stream = 0;
        Room<T, 4096> room;
        T *y = room.take(part.outer * d);
        run_forward<T>(part, {static_cast<const T *>(x) + first * d, nullptr, call.weight, call.bias, y, nullptr, nullptr, nullptr, nullptr});
        for (int64_t row = first; row < first + part.outer; ++row, y += d) {
            Vec<A> largest{}, odd{};
            over(d, [&](auto at) {
                Vec<A> v = at(y), size = v < 0 ? -v : v;
                largest = size > largest ? size : largest, odd += 0 * v;  // which a NaN or infinity makes a NaN
            });
            float most = float(sum_lanes<A>(odd));
            for (int lane = 0; lane < LANES; ++lane) most = std::max(most, float(largest[lane]));
            const float inverse = most > 0 ? 127 / most : 0;
            scale[row] = most / 127;
            over(d, [&](auto at) {
                // 1.5 * 2^23 rounds to an integer in the low bits.
                lanes::F32 shifted = __builtin_convertvector(at(y), lanes::F32) * inverse + 12582912.0f;
                auto bytes = __builtin_convertvector(reinterpret_cast<lanes::I32>(shifted), Bytes);
                std::memcpy(q + row * d + at.i, &bytes, std::size_t(std::min<int64_t>(LANES, d - at.i)));
            });
        }
    });
    return status;
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

NK_EXPORT int32_t nk_quantize(const NkPlan *plan, const void *x, const void *weight, const void *bias, void *q, void *scale) {
    using namespace nk;
    return guarded([&]() -> NkStatus {
        if (!agree(*plan, weight, bias)) return NK_NULL;
        if (elements(*plan) == 0) return NK_OK;
        // Rows alone, whose parameters are the same for all.
        if (any_null(x, q, scale) || plan->given || plan->far * plan->kept != 1 || plan->outer_step != 0) return NK_NULL;
        return by_type(plan->type, [&](auto t) {
            return quantize<decltype(t)>(*plan, x, weight, bias, static_cast<int8_t *>(q), static_cast<float *>(scale));
        });
    });
}
