// Threads: torch's own, handed over at load; one after the other where torch has none to give.
#pragma once
#include <cstdint>
#include <type_traits>

namespace nk {

using Body = void (*)(int64_t begin, int64_t end, void *context);

// torch's threads answered with an error after part of the work had begun. Doing it again could add to sums twice.
struct ThreadsFailed {};

// Elements that are worth waking a thread for: below, a thread's start takes longer than the work.
constexpr int64_t WORTH_A_THREAD = 1 << 14;
// The tasks that make up that many elements.
inline int64_t grain_of(int64_t elements_a_task) {
    return elements_a_task <= 0 || elements_a_task >= WORTH_A_THREAD ? 1 : WORTH_A_THREAD / elements_a_task;
}

// Runs body over [0, tasks), cut into ranges of at least `grain` tasks, on torch's threads. What a task computes must not depend on the range
// it lies in: then results do not depend on the number of threads. Throws what a body throws, as std::bad_alloc, and ThreadsFailed.
void parallel(int64_t tasks, int64_t grain, Body body, void *context);
int64_t threads();

// ranges(begin, end) for ranges that cover [0, tasks): for what is prepared once a thread.
template <class Ranges> void for_ranges(int64_t tasks, Ranges &&ranges, int64_t grain = 1) {
    using F = std::remove_reference_t<Ranges>;
    parallel(tasks, grain, [](int64_t begin, int64_t end, void *context) { (*static_cast<F *>(context))(begin, end); },
             const_cast<std::remove_const_t<F> *>(&ranges));
}

// each(task) for every task of [0, tasks).
template <class Each> void for_each(int64_t tasks, Each &&each, int64_t grain = 1) {
    for_ranges(tasks, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) each(task);
    }, grain);
}

}  // namespace nk
