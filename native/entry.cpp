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

// use(weight, bias, P{}), P their type; they come in the accumulation type, the offset added: the parameter itself, or a calm copy.
template <class T, class Use> NkStatus with_parameters(const NkPlan &plan, const void *weight, const void *bias, Use &&use) {
    using A = accumulator<T>;
    Room<A> weight_room, bias_room;
    return by_type(plan.parameter_type, [&](auto p) {
        auto widened = [&](Room<A> &room, const void *parameter, double offset) -> const A * {
            auto from = static_cast<const decltype(p) *>(parameter);
            if (from == nullptr) return nullptr;
            if constexpr (std::is_same_v<decltype(p), A>)
                if (offset == 0 && all_calm<T>(from, plan.parameters)) return from;
            A *to = room.take(plan.parameters);
            for (int64_t i = 0; i < plan.parameters; ++i) to[i] = calm(A(widen(from[i])) + A(offset));
            return to;
        };
        use(widened(weight_room, weight, plan.offset), widened(bias_room, bias, 0), p);
    });
}

template <class T>
NkStatus forward(const NkPlan &plan, const void *x, const void *residual, const void *weight, const void *bias, void *y, void *sum,
                 void *center, void *inverse, void *variance) {
    using A = accumulator<T>;
    return with_parameters<T>(plan, weight, bias, [&](const A *gain, const A *shift, auto) {
        run_forward<T>(plan, {static_cast<const T *>(x), static_cast<const T *>(residual), gain, shift, static_cast<T *>(y),
                              static_cast<T *>(sum), static_cast<A *>(center), static_cast<A *>(inverse), static_cast<A *>(variance)});
    });
}

template <class T>
NkStatus backward(const NkPlan &plan, const void *dy, const void *dsum, const void *x, const void *weight, const void *bias,
                  const void *center, const void *inverse, void *dx, void *dweight, void *dbias) {
    using A = accumulator<T>;
    return with_parameters<T>(plan, weight, bias, [&](const A *gain, const A *shift, auto p) {
        using P = decltype(p);
        Room<A> dweight_room, dbias_room;
        // Gradients are summed up in the caller's own memory where that is of the accumulation type.
        auto sums_of = [&](Room<A> &room, void *gradient) {
            return gradient == nullptr || std::is_same_v<P, A> ? static_cast<A *>(gradient) : room.take(plan.parameters);
        };
        Backward<T> call{static_cast<const T *>(dy), static_cast<const T *>(dsum), static_cast<const T *>(x), gain, shift,
                         static_cast<const A *>(center), static_cast<const A *>(inverse), static_cast<T *>(dx),
                         sums_of(dweight_room, dweight), sums_of(dbias_room, dbias), plan.activation};
        if (plan.parts & NK_OUTPUT) call.kind = plan.activation == NK_LEAKY_RELU ? LEAKY_OUTPUT : OUTPUT;
        if (elements(plan) > 0) run_backward<T>(plan, call);
        for (auto [sums, gradient] : {std::pair(call.dweight, dweight), std::pair(call.dbias, dbias)}) {
            if (gradient == nullptr) continue;
            if (elements(plan) == 0) std::fill_n(sums, plan.parameters, A(0));  // sums of nothing are still to be written
            for (int64_t i = 0; sums != gradient && i < plan.parameters; ++i)
                static_cast<P *>(gradient)[i] = narrow<P>(accumulator<P>(sums[i]));
        }
    });
}

typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Rows of y as whole numbers from -127 to 127 and a scale each; of a row with a NaN or infinity the scale says so. A few rows of y at a time.
template <class T, class A> void quantize(const NkPlan &plan, const T *x, const A *weight, const A *bias, int8_t *q, float *scale) {
    const int64_t d = set_size(plan), together = std::max<int64_t>(1, 4096 / d);
    for_each((plan.outer + together - 1) / together, [&](int64_t task) {
        int64_t first = task * together;
        NkPlan part = plan;
        part.outer = std::min(together, plan.outer - first), part.stream = 0;
        Room<T, 4096> room;
        T *y = room.take(part.outer * d);
        run_forward<T>(part, {x + first * d, nullptr, weight, bias, y, nullptr, nullptr, nullptr, nullptr});
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
}

}  // namespace
}  // namespace nk

NK_EXPORT int32_t nk_forward(const NkPlan *plan, const void *x, const void *residual, const void *weight, const void *bias, void *y,
                             void *sum, void *center, void *inverse, void *variance) {
    using namespace nk;
    if (!agree(*plan, weight, bias)) return NK_NULL;
    return enter(plan->type, elements(*plan), [&](auto t) {
        if ((residual == nullptr) != (sum == nullptr) || (plan->given && (inverse == nullptr || residual != nullptr))) return NK_NULL;
        return forward<decltype(t)>(*plan, x, residual, weight, bias, y, sum, center, inverse, variance);
    }, x, y);
}

// The statistics alone.
NK_EXPORT int32_t nk_measure(const NkPlan *plan, const void *x, void *center, void *inverse, void *variance) {
    using namespace nk;
    return enter(plan->type, elements(*plan), [&](auto t) {
        if (plan->given) return NK_NULL;
        return forward<decltype(t)>(*plan, x, nullptr, nullptr, nullptr, nullptr, nullptr, center, inverse, variance);
    }, x, center, inverse, variance);
}

NK_EXPORT int32_t nk_backward(const NkPlan *plan, const void *dy, const void *dsum, const void *x, const void *weight, const void *bias,
                              const void *center, const void *inverse, void *dx, void *dweight, void *dbias) {
    using namespace nk;
    if (!agree(*plan, weight, bias)) return NK_NULL;
    const bool uncentred = center == nullptr && plan->centred && !plan->given;
    if (elements(*plan) > 0 && (any_null(dy, x, inverse) || uncentred)) return NK_NULL;
    return guarded([&] {
        return by_type(plan->type, [&](auto t) {
            return backward<decltype(t)>(*plan, dy, dsum, x, weight, bias, center, inverse, dx, dweight, dbias);
        });
    });
}

NK_EXPORT int32_t nk_quantize(const NkPlan *plan, const void *x, const void *weight, const void *bias, void *q, void *scale) {
    using namespace nk;
    if (!agree(*plan, weight, bias)) return NK_NULL;
    return enter(plan->type, elements(*plan), [&](auto t) {
        // Rows alone, whose parameters are the same for all.
        if (plan->given || plan->far * plan->kept != 1 || plan->outer_step != 0) return NK_NULL;
        return with_parameters<decltype(t)>(*plan, weight, bias, [&](auto *gain, auto *shift, auto) {
            quantize(*plan, static_cast<const decltype(t) *>(x), gain, shift, static_cast<int8_t *>(q), static_cast<float *>(scale));
        });
    }, x, q, scale);
}
