// One call for any number of weights: concatenates the work of all and splits it across threads.
#include "weights.h"

#include <algorithm>
#include <vector>

#include "typed.h"

namespace nk {

namespace {

template <class T> NewJob job_of(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    switch (plan.method) {
        case NK_NORMALIZE: return plan.sets == NK_NEAR ? near_job<T>(plan, call, backward) : apart_job<T>(plan, call, backward);
        case NK_SEQUENTIAL:
        case NK_SIMULTANEOUS:
        case NK_RUIZ: return both_job<T>(plan, call, backward);
        case NK_SPECTRAL: break;
    }
    return spectral_job<T>(plan, call, backward);
}

void run_phase(const std::vector<NewJob> &jobs, int phase, std::vector<int64_t> &ends) {
    int64_t total = 0;
    for (std::size_t j = 0; j < jobs.size(); ++j) ends[j] = total += jobs[j]->tasks(phase);
    for_each(total, [&](int64_t task) {
        auto j = std::size_t(std::upper_bound(ends.begin(), ends.end(), task) - ends.begin());
        jobs[j]->run(phase, j == 0 ? task : task - ends[j - 1]);
    });
}

// Rows of one weight, the work of most calls, without the jobs that only many weights need.
bool is_at_once(const NkWeightPlan &plan) { return plan.method == NK_NORMALIZE && plan.sets == NK_NEAR && fits_rows(plan); }

NkStatus at_once(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    int64_t rows = plan.groups * plan.far, many = rows_a_task(plan);
    return by_type(plan.type, [&](auto t) {
        for_each(ceil_div(rows, many), [&](int64_t task) {
            near_rows<decltype(t)>(plan, call, backward, task * many, std::min((task + 1) * many, rows));
        });
    });
}

bool complete(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    if (!agrees(plan.parts, NK_GAIN, call.gain)) return false;
    if (size_of(plan) == 0) return true;
    if (any_null(call.weight, call.result) || (backward && call.gradient == nullptr)) return false;
    if (plan.method != NK_SPECTRAL) return true;
    return call.kept != nullptr && (backward || !any_null(call.left, call.right));
}

NkStatus run(int64_t count, const NkWeightPlan *const *plans, const NkWeightCall *calls, bool backward) {
    // All are looked at before any is written.
    for (int64_t i = 0; i < count; ++i)
        if (!complete(*plans[i], calls[i], backward)) return NK_NULL;
    if (count == 1 && size_of(*plans[0]) > 0 && is_at_once(*plans[0])) return at_once(*plans[0], calls[0], backward);
    std::vector<NewJob> jobs;
    int phases = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (size_of(*plans[i]) == 0) continue;
        NkStatus status = by_type(plans[i]->type, [&](auto t) { jobs.push_back(job_of<decltype(t)>(*plans[i], calls[i], backward)); });
        if (status != NK_OK) return status;
        while (jobs.back()->tasks(phases) > 0) ++phases;
    }
    std::vector<int64_t> ends(jobs.size());
    for (int phase = 0; phase < phases; ++phase) run_phase(jobs, phase, ends);
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
