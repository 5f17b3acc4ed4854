// The loop nest that every rule on a dense tensor comes down to, as Python hands it over.
//
// In the order of memory, a tensor is outer x far x kept x mid x inner. Statistics differ along outer and kept, and are computed over
// far, mid and inner:
//
//     row      far = 1                 LayerNorm, RMSNorm; GroupNorm and InstanceNorm with channels first; weights over their rows
//     column   mid = inner = 1         BatchNorm and InstanceNorm with channels last; LayerNorm over channels with channels first
//     block    both sides              BatchNorm with channels first, GroupNorm with channels last
//
// x is at (((o * far + f) * kept + k) * mid + m) * inner + i, its statistic at o * kept + k, its weight and bias at
// outer_place(o) + f * per_far + k * per_kept + m * per_mid + i * per_inner.
//
// Sizes, with statistics = outer * kept and A the accumulation type (float; double for double):
//
//     x, y, residual, sum, dy, dsum, dx    outer * far * kept * mid * inner elements of `type`
//     center, inverse, variance            `statistics` elements of A
//     weight, bias, dweight, dbias         `parameters` elements of `parameter_type`
//
// Nothing is read or written beyond them, and every element of an output is written. The library can't check what a pointer leads to;
// that is for the caller.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define NK_EXPORT extern "C" __declspec(dllexport)
#else
#define NK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// What every entry point returns; where it is not NK_OK, outputs hold nothing of use, and after NK_NULL they are as they were.
enum [[nodiscard]] NkStatus : int32_t {
    NK_OK = 0,
    NK_NO_MEMORY = 1,
    NK_UNKNOWN_TYPE = 2,
    NK_NULL = 3,            // a pointer is null that must not be, or the reverse, as where a flag of `parts` says otherwise
    NK_THREADS_FAILED = 4,  // torch's threads stopped half-way
};
// Which optional inputs the caller passes. A tensor without memory has a null pointer too: the flag tells it from an absent one.
// NK_OUTPUT: the backward pass is given the output y in the place of x, of an activation that can be undone.
enum NkParts : int32_t { NK_WEIGHT = 1, NK_BIAS = 2, NK_OUTPUT = 4, NK_GAIN = 1 };
// What of a gate is of the accumulation type.
enum NkWide : int32_t { NK_WIDE_X = 1, NK_WIDE_Y = 2 };

enum NkType : int32_t { NK_FLOAT32 = 0, NK_FLOAT64 = 1, NK_BFLOAT16 = 2, NK_FLOAT16 = 3 };
enum NkScale : int32_t { NK_UNSCALED = 0, NK_MEAN_SQUARE = 1, NK_SUM_SQUARE = 2 };
enum NkGuard : int32_t { NK_INSIDE = 0, NK_OUTSIDE = 1, NK_FLOOR = 2 };
enum NkActivation : int32_t { NK_LINEAR = 0, NK_RELU = 1, NK_SILU = 2, NK_GELU = 3, NK_GELU_TANH = 4, NK_LEAKY_RELU = 5 };

struct NkPlan {
    int64_t outer, far, kept, mid, inner;
    // Where the weight and the bias of an element are; outer_place(o) = (o / outer_div) % outer_mod * outer_step.
    int64_t outer_div, outer_mod, outer_step, per_far, per_kept, per_mid, per_inner;
    int64_t parameters;  // elements of the weight, and of the bias
    double eps, offset;  // the gain is offset + weight
    int32_t type, parameter_type;
    int32_t centred, scale, guard, correction;
    int32_t activation;
    int32_t given;  // 1: centre and inverse are given, not computed
    int32_t stream;  // 1: the output is far beyond the cache, write it past the cache
    int32_t parts;   // NK_WEIGHT | NK_BIAS | NK_OUTPUT
};
