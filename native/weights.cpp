// One call for any number of weights: concatenates the work of all and splits it across threads.
#include "weights.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "room.h"
#include "typed.h"

namespace nk {

namespace {

// NK_NORMALIZE over sets that lie apart, or are too long for one thread each: the loop nest of any other rule, with a gain for each set.
template <class T> void normalize(const NkWeightPlan &p, const NkWeightCall &call, bool backward) {
    using A = accumulator<T>;
    const bool near = p.sets == NK_NEAR, varies = call.gain || call.dgain;
    const int64_t sets = p.groups * (near ? p.far : p.kept);
    NkPlan plan = statistic_of(p, near ? p.kept * p.inner : p.inner);
    plan.outer = near ? sets : p.groups;
    if (!near) plan.far = p.far, plan.kept = p.kept;
    plan.outer_div = 1, plan.outer_mod = plan.outer, plan.outer_step = varies ? plan.kept : 0;
    plan.per_kept = varies;
    plan.parameters = varies ? sets : 1;

    Room<A> gain_room, statistics_room, dgain_room;
    Forward<T> forward{};
    forward.x = static_cast<const T *>(call.weight);
    auto given = static_cast<const T *>(call.gain);
    if (given || p.factor != 1) {
        A *gain = gain_room.take(plan.parameters);
        for (int64_t i = 0; i < plan.parameters; ++i) gain[i] = A(p.factor * (given ? double(widen(given[i])) : 1));
        forward.weight = gain;
    }
    if (!backward) {
        forward.y = static_cast<T *>(call.result);
        return run_forward<T>(plan, forward);
    }
    A *center = statistics_room.take(2 * sets), *dgain = call.dgain ? dgain_room.take(sets) : nullptr;
    forward.center = center, forward.inverse = center + sets;
    run_forward<T>(plan, forward);
    if (p.constant) plan.scale = NK_UNSCALED;  // whose derivative is none
    run_backward<T>(plan, {static_cast<const T *>(call.gradient), nullptr, forward.x, forward.weight, nullptr, center, center + sets,
                           static_cast<T *>(call.result), dgain, nullptr});
    for (int64_t i = 0; dgain && i < sets; ++i) static_cast<T *>(call.dgain)[i] = narrow<T>(A(p.factor * double(dgain[i])));
}

// Near sets that are short enough for one thread each.
bool by_rows(const NkWeightPlan &plan) {
    int64_t n = plan.kept * plan.inner, rows = plan.groups * plan.far;
    return plan.method == NK_NORMALIZE && plan.sets == NK_NEAR && (n <= 4 * GRAIN || (n <= 64 * GRAIN && rows >= 256));
}

template <class T> struct RowsJob final : Job {
    const NkWeightPlan &plan;
    const NkWeightCall &call;
    const bool backward;
    const int64_t rows, together;

    RowsJob(const NkWeightPlan &plan, const NkWeightCall &call, bool backward)
        : plan(plan), call(call), backward(backward), rows(plan.groups * plan.far),
          together(std::max<int64_t>(GRAIN / (plan.kept * plan.inner), 1)) {}
    int64_t tasks(int phase) const override { return phase > 0 ? 0 : ceil_div(rows, together); }
    void run(int, int64_t task) override {
        near_rows<T>(plan, call, backward, task * together, std::min((task + 1) * together, rows));
    }
};

template <class T> NewJob job_of(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    if (plan.method == NK_NORMALIZE) return NewJob(new RowsJob<T>(plan, call, backward));
    return plan.method == NK_SPECTRAL ? spectral_job<T>(plan, call, backward) : both_job<T>(plan, call, backward);
}

bool complete(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    if (!agrees(plan.parts, NK_GAIN, call.gain)) return false;
    if (size_of(plan) == 0) return true;
    if (any_null(call.weight, call.result) || (backward && call.gradient == nullptr)) return false;
    return plan.method != NK_SPECTRAL || (call.kept != nullptr && (backward || !any_null(call.left, call.right)));
}

NkStatus run(int64_t count, const NkWeightPlan *const *plans, const NkWeightCall *calls, bool backward) {
    // All are looked at before any is written.
    for (int64_t i = 0; i < count; ++i)
        if (!complete(*plans[i], calls[i], backward)) return NK_NULL;
    std::vector<NewJob> jobs;
    int phases = 0;
    for (int64_t i = 0; i < count; ++i) {
        const NkWeightPlan &plan = *plans[i];
        if (size_of(plan) == 0) continue;
        // Sets that lie apart, or are long, are cut across the threads by their own kernels.
        bool whole = plan.method == NK_NORMALIZE && !by_rows(plan);
        NkStatus status = by_type(plan.type, [&](auto t) {
            using T = decltype(t);
            if (whole) normalize<T>(plan, calls[i], backward);
            else jobs.push_back(job_of<T>(plan, calls[i], backward));
        });
        if (status != NK_OK) return status;
        while (!whole && jobs.back()->tasks(phases) > 0) ++phases;
    }
    std::vector<int64_t> ends(jobs.size());
    for (int phase = 0; phase < phases; ++phase) {
        int64_t total = 0;
        for (std::size_t j = 0; j < jobs.size(); ++j) ends[j] = total += jobs[j]->tasks(phase);
        for_each(total, [&](int64_t task) {
            auto j = std::size_t(std::upper_bound(ends.begin(), ends.end(), task) - ends.begin());
            jobs[j]->run(phase, j == 0 ? task : task - ends[j - 1]);
        });
    }
    return NK_OK;
}

}  // namespace
}  // namespace nk

NK_EXPORT int32_t nk_weights(int64_t count, const NkWeightPlan *const *plans, const NkWeightCall *calls, int64_t backward) {
    return nk::guarded([&] { return nk::run(count, plans, calls, backward != 0); });
}

// One weight of NK_NORMALIZE, without an array to fill.
NK_EXPORT int32_t nk_weight_forward(const NkWeightPlan *plan, const void *weight, const void *gain, void *result) {
    NkWeightCall call{weight, gain, nullptr, result, nullptr, nullptr, nullptr, nullptr};
    return nk::guarded([&] { return nk::run(1, &plan, &call, false); });
}

NK_EXPORT int32_t nk_weight_backward(const NkWeightPlan *plan, const void *gradient, const void *weight, const void *gain, void *result,
                                     void *dgain) {
    NkWeightCall call{weight, gain, gradient, result, dgain, nullptr, nullptr, nullptr};
    return nk::guarded([&] { return nk::run(1, &plan, &call, true); });
}
