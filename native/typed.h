// What every entry point that Python calls does first: looks at pointers, tells the types apart, and turns exceptions into statuses.
#pragma once
#include <new>
#include <type_traits>

#include "plan.h"
#include "threads.h"
#include "vector.h"

namespace nk {

// run(T{}) for the type's C++ twin, and the status that it returns, if it does.
template <class Run> NkStatus by_type(int32_t type, Run &&run) {
    auto with = [&](auto t) -> NkStatus {
        if constexpr (std::is_void_v<decltype(run(t))>) return run(t), NK_OK;
        else return run(t);
    };
    switch (type) {
        case NK_FLOAT32: return with(float{});
        case NK_FLOAT64: return with(double{});
        case NK_BFLOAT16: return with(bfloat16{});
        case NK_FLOAT16: return with(float16{});
    }
    return NK_UNKNOWN_TYPE;
}

// The status that run() returns; no exception may reach Python.
template <class Run> NkStatus guarded(Run &&run) try {
    return run();
} catch (const std::bad_alloc &) {
    return NK_NO_MEMORY;
} catch (const ThreadsFailed &) {
    return NK_THREADS_FAILED;
}

template <class... P> bool any_null(const P *...pointers) { return (... || (pointers == nullptr)); }
// The status of run(T{}), which is called where there are elements; then the `needed` pointers must be there too.
template <class Run, class... P> NkStatus enter(int32_t type, int64_t elements, Run &&run, const P *...needed) {
    if (elements == 0) return NK_OK;
    return any_null(needed...) ? NK_NULL : guarded([&] { return by_type(type, run); });
}
// Whether a pointer is there as its flag says.
inline bool agrees(int32_t parts, int32_t flag, const void *pointer) { return ((parts & flag) != 0) == (pointer != nullptr); }

}  // namespace nk
