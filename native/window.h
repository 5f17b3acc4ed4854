// Local response normalization: y_c = x_c / s_c^power with s_c = offset + factor * (x^2 summed over the channels c - before to c + after).
//
// In the order of memory, a tensor is outer x channels x inner: inner is the positions with channels first, and 1 with channels last.
#pragma once
#include "plan.h"

struct NkWindow {
    int64_t outer, channels, inner;
    int64_t before, after;  // below channels, as nothing lies beyond
    double offset, factor, power;
    int32_t type, reserved;
};
