#include "threads.h"

#include <atomic>
#include <new>

#include "plan.h"

namespace nk {
namespace {

using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void *context);
using NumThreads = int32_t (*)(uint32_t *count);

ParallelFor torch_parallel_for = nullptr;
NumThreads torch_num_threads = nullptr;

// An exception must not leave the library through torch's frames: a body that runs out of memory leaves a note instead.
struct Region {
    Body body;
    void *context;
    std::atomic<bool> began{false}, no_memory{false};

    static void run(int64_t begin, int64_t end, void *region) {
        Region &r = *static_cast<Region *>(region);
        r.began.store(true, std::memory_order_relaxed);
        try {
            r.body(begin, end, r.context);
        } catch (const std::bad_alloc &) {
            r.no_memory.store(true, std::memory_order_relaxed);
        }
    }
};

}  // namespace

int64_t threads() {
    uint32_t count = 1;
    if (torch_num_threads != nullptr && torch_num_threads(&count) != 0) count = 1;
    return count;
}

void parallel(int64_t tasks, int64_t grain, Body body, void *context) {
    if (tasks <= 0) return;
    if (tasks <= grain || torch_parallel_for == nullptr) return body(0, tasks, context);
    Region region{body, context};
    int32_t failed = torch_parallel_for(0, tasks, grain, &Region::run, &region);
    if (region.no_memory) throw std::bad_alloc();
    if (failed == 0) return;
    if (region.began) throw ThreadsFailed();
    body(0, tasks, context);
}

}  // namespace nk

// torch's C functions torch_parallel_for and torch_get_num_threads, or null.
NK_EXPORT void nk_set_threads(void *parallel_for, void *num_threads) {
    nk::torch_parallel_for = reinterpret_cast<nk::ParallelFor>(parallel_for);
    nk::torch_num_threads = reinterpret_cast<nk::NumThreads>(num_threads);
}
