// What every entry point that Python calls does first: tells the types apart, and keeps exceptions from reaching Python.
#pragma once
#include <new>

#include "plan.h"
#include "vector.h"

namespace nk {

enum Outcome : int32_t { NK_DONE = 0, NK_OUT_OF_MEMORY = 1, NK_NO_SUCH_TYPE = 2 };

// run(T{}) for the type's C++ twin.
template <class Run> int32_t by_type(int32_t type, Run &&run) try {
    switch (type) {
        case NK_FLOAT32: run(float{}); return NK_DONE;
        case NK_FLOAT64: run(double{}); return NK_DONE;
        case NK_BFLOAT16: run(bfloat16{}); return NK_DONE;
        case NK_FLOAT16: run(float16{}); return NK_DONE;
    }
    return NK_NO_SUCH_TYPE;
} catch (const std::bad_alloc &) {
    return NK_OUT_OF_MEMORY;
}

}  // namespace nk
