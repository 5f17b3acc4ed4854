// Running statistics: normalizing by them, and taking a batch's into them.
#include "plan.h"
#include "statistic.h"
#include "typed.h"

namespace nk {
namespace {

// As torch.lerp: exact at both ends.
template <class A> A blend(A old, A fresh, A weight) {
    return weight < A(0.5) ? old + weight * (fresh - old) : fresh - (fresh - old) * (1 - weight);
}

// `New` is of the fresh statistics, R of the running ones.
template <class New, class R>
void remember(int64_t channels, double momentum, double factor, bool moments, const New *mean, const New *variance, R *running_mean,
              R *running_variance) {
    using A = accumulator<R>;
    const A weight = A(momentum);
    for (int64_t c = 0; c < channels; ++c) {
        A old = widen(running_mean[c]), fresh = A(mean[c]), change = fresh - old;
        R mixed_mean = narrow<R>(blend(old, fresh, weight)), mixed_variance{};
        bool finite = std::isfinite(widen(mixed_mean));
        if (variance != nullptr) {
            A mixed = blend(A(widen(running_variance[c])), A(double(variance[c]) * factor), weight);
            if (moments) mixed += weight * (1 - weight) * change * change;
            mixed_variance = narrow<R>(mixed);
            finite = finite && std::isfinite(widen(mixed_variance));
        }
        // Judged by what would be kept: a variance that a half type can't hold leaves its channel as it was, mean and all.
        if (!finite) continue;
        running_mean[c] = mixed_mean;
        if (variance != nullptr) running_variance[c] = mixed_variance;
    }
}

}  // namespace
}  // namespace nk

// 1 / scale and centre of each set from a given variance and mean. `mean` and `variance` are outer * kept elements of `type`, `inverse` and
// `center` as many of the plan's accumulation type. The variance may be null where the rule does not scale.
NK_EXPORT int32_t nk_given(const NkPlan *plan, int64_t type, const void *mean, const void *variance, void *inverse, void *center) {
    using namespace nk;
    NkPlan of_variance = *plan;
    of_variance.scale = plan->scale == NK_UNSCALED ? NK_UNSCALED : NK_SUM_SQUARE;
    const int64_t sets = plan->outer * plan->kept;
    auto fill = [&](auto a, auto t) {
        using A = decltype(a);
        auto m = static_cast<const decltype(t) *>(mean), v = static_cast<const decltype(t) *>(variance);
        for (int64_t k = 0; k < sets; ++k) {
            double square = v == nullptr ? 0 : double(widen(v[k]));
            static_cast<A *>(inverse)[k] = inverse_scale<A>(of_variance, square);
            static_cast<A *>(center)[k] = A(widen(m[k]));
        }
    };
    return enter(int32_t(type), sets, [&](auto t) {
        if (variance == nullptr && plan->scale != NK_UNSCALED) return NK_NULL;
        plan->type == NK_FLOAT64 ? fill(double{}, t) : fill(float{}, t);
        return NK_OK;
    }, mean, inverse, center);
}

// Running statistics of one training batch: running <- (1 - momentum) running + momentum new, blended in float (double for double) and then
// rounded to the running type; a channel of which either result is not finite keeps both old values. The new variance is variance * factor;
// `moments` keeps E[x^2] in place of an average of variances. mean and variance are `channels` elements of `type`, float or double; the
// running ones as many of `running_type`. Both variances are null where none is kept.
NK_EXPORT int32_t nk_remember(int64_t channels, int64_t type, int64_t running_type, double momentum, double factor, int64_t moments,
                              const void *mean, const void *variance, void *running_mean, void *running_variance) {
    using namespace nk;
    if (type != NK_FLOAT32 && type != NK_FLOAT64) return NK_UNKNOWN_TYPE;
    return enter(int32_t(running_type), channels, [&](auto r) {
        if ((variance == nullptr) != (running_variance == nullptr)) return NK_NULL;
        auto with = [&](auto t) {
            using New = decltype(t);
            using R = decltype(r);
            remember(channels, momentum, factor, moments != 0, static_cast<const New *>(mean), static_cast<const New *>(variance),
                     static_cast<R *>(running_mean), static_cast<R *>(running_variance));
        };
        type == NK_FLOAT32 ? with(float{}) : with(double{});
        return NK_OK;
    }, mean, running_mean);
}
