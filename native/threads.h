// Threads: torch's own, handed over at load; one after the other where torch has none to give.
#pragma once
#include <cstdint>
#include <type_traits>

namespace nk {

using Body = void (*)(int64_t begin, int64_t end, void *context);

// Runs body over [0, tasks), cut into ranges, on torch's threads. What a task computes must not depend on the range it lies in: then
// results do not depend on the number of threads.
void parallel(int64_t tasks, Body body, void *context);
int64_t threads();

// each(task) for every task of [0, tasks).
template <class Each> void for_each(int64_t tasks, Each &&each) {
    using F = std::remove_reference_t<Each>;
    parallel(
        tasks,
        [](int64_t begin, int64_t end, void *context) {
            F &f = *static_cast<F *>(context);
            for (int64_t task = begin; task < end; ++task) f(task);
        },
        const_cast<std::remove_const_t<F> *>(&each));
}

// ranges(begin, end) for ranges that cover [0, tasks): for what is prepared once a thread.
template <class Ranges> void for_ranges(int64_t tasks, Ranges &&ranges) {
    using F = std::remove_reference_t<Ranges>;
    parallel(
        tasks, [](int64_t begin, int64_t end, void *context) { (*static_cast<F *>(context))(begin, end); },
        const_cast<std::remove_const_t<F> *>(&ranges));
}

}  // namespace nk
