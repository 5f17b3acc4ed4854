// What the kernels on weights share: how their work is cut, and how they walk a row.
#pragma once
#include <cstdint>
#include <memory>

#include "plan.h"
#include "row.h"
#include "statistic.h"
#include "weight_plan.h"

namespace nk {

// About as many elements as are worth a thread's while. Part of the rounding of sums: it must not depend on the number of threads.
constexpr int64_t GRAIN = 32768;
inline int64_t size_of(const NkWeightPlan &p) { return p.groups * p.far * p.kept * p.inner; }
inline int64_t at_least_one(int64_t n) { return n > 0 ? n : 1; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The statistic of a set of n elements, as an ordinary rule's.
inline NkPlan statistic_of(const NkWeightPlan &p, int64_t n) {
    NkPlan s{};
    s.outer = s.far = s.kept = s.mid = 1;
    s.inner = n;
    s.type = p.type, s.eps = p.eps;
    s.centred = p.centred, s.scale = p.scale, s.guard = p.guard, s.correction = p.correction;
    return s;
}

// Work on one weight: phases, one after the other, of tasks that may run at once. Merging partial results is a phase of its own.
struct Job {
    virtual ~Job() = default;
    virtual int64_t tasks(int phase) const = 0;  // 0: there is no such phase
    virtual void run(int phase, int64_t task) = 0;
};
using NewJob = std::unique_ptr<Job>;

template <class T> NewJob both_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);
template <class T> NewJob spectral_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward);

// NK_NORMALIZE over near sets [begin, end).
template <class T> void near_rows(const NkWeightPlan &plan, const NkWeightCall &call, bool backward, int64_t begin, int64_t end);

}  // namespace nk
