// Kernels on weights: what Python hands over, and what the kernels share. One call takes any number of weights.
//
// In the order of memory a weight is groups x far x kept x inner. It has two systems of sets:
//
//     near   one set for each (group, far): kept * inner elements next to one another; the rows of most layers
//     apart  one set for each (group, kept): far pieces of inner elements; columns, and the rows of transposed convolutions
//
// Backward passes measure the weight again in place of keeping statistics: a row is read for its gradient anyway.
#pragma once
#include <cstdint>

#include "plan.h"

enum NkSets : int32_t { NK_NEAR = 0, NK_APART = 1 };
enum NkMethod : int32_t {
    NK_NORMALIZE = 0,     // the sets of one system, by any statistic
    NK_SEQUENTIAL = 1,    // norms of one system, then of the other, of what came out
    NK_SIMULTANEOUS = 2,  // norms of both
    NK_RUIZ = 3,          // roots of the norms of both, again and again
    NK_SPECTRAL = 4,      // the largest singular value of the far x kept matrix
};

struct NkWeightPlan {
    int64_t groups, far, kept, inner;
    double eps, factor;  // the factor multiplies the result, the length of the gains too
    int32_t type, method;
    int32_t sets;  // of NK_NORMALIZE; of NK_SEQUENTIAL those that come first
    int32_t centred, scale, guard, correction;
    int32_t constant;    // 1: backward takes the divisors as constants
    int32_t iterations;  // of NK_RUIZ; of NK_SPECTRAL, 0 to leave the vectors as they are
    int32_t parts;       // NK_GAIN
};

// Pointers to one weight, all but gain's and dgain's to groups * far * kept * inner elements of its type.
struct NkWeightCall {
    const void *weight;
    const void *gain;      // of NK_NORMALIZE: one for each set, of the weight's type; null unless plan.parts has NK_GAIN
    const void *gradient;  // backward: that of what forward wrote; else null
    void *result;          // forward: the weight as it is used; backward: the gradient of the raw one
    void *dgain;           // backward: as the gain; null where it is not wanted
    // Of NK_SPECTRAL, else null. The singular vectors, `far` and `kept * inner` elements of the weight's type, which forward improves in
    // place; and 1 / sigma with the vectors that it was computed from, 1 + far + kept * inner elements of the accumulation type, which
    // forward writes and backward reads.
    void *left, *right, *kept;
};
