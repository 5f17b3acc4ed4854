// Which of the libraries this processor can run; asked of the baseline library, which every processor can.
#include "plan.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace {

// Bits that __builtin_cpu_supports has no name for in every compiler.
bool has_small_extensions_of_v3() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    constexpr unsigned f16c = 1u << 29, movbe = 1u << 22;
    if ((c & f16c) == 0 || (c & movbe) == 0) return false;
    constexpr unsigned lzcnt = 1u << 5;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & lzcnt) != 0;
}

}  // namespace
#endif

// The version of the structures and arguments that Python hands over; raised with _ABI of engine/library.py when they change.
NK_EXPORT int32_t nk_abi() { return 4; }

// 1, 3 or 4 for baseline, x86-64-v3 and x86-64-v4.
NK_EXPORT int nk_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // The names that are asked for here also cover that the operating system saves the wide registers.
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && has_small_extensions_of_v3();
    if (!v3) return 1;
    bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return v4 ? 4 : 3;
#else
    return 1;
#endif
}
