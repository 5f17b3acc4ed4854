#include "threads.h"

#include <cstddef>

#include "plan.h"

namespace nk {
namespace {

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void *context);
using NumThreads = int32_t (*)(uint32_t *count);

ParallelFor torch_parallel_for = nullptr;
NumThreads torch_num_threads = nullptr;

}  // namespace

int64_t threads() {
    uint32_t count = 1;
    if (torch_num_threads != nullptr && torch_num_threads(&count) != 0) count = 1;
    return count;
}

void parallel(int64_t tasks, Body body, void *context) {
    if (tasks <= 0) return;
    if (tasks > 1 && torch_parallel_for != nullptr && torch_parallel_for(0, tasks, 1, body, context) == 0) return;
    body(0, tasks, context);
}

}  // namespace nk

// torch's C functions torch_parallel_for and torch_get_num_threads, or null.
NK_EXPORT void nk_set_threads(void *parallel_for, void *num_threads) {
    nk::torch_parallel_for = reinterpret_cast<nk::ParallelFor>(parallel_for);
    nk::torch_num_threads = reinterpret_cast<nk::NumThreads>(num_threads);
}
