// What Python hands over to the kernels of response normalization, local and global.
#pragma once
#include "plan.h"

// Local: y_c = x_c / s_c^power with s_c = offset + factor * (x^2 summed over the channels c - before to c + after).
//
// In the order of memory, a tensor is outer x channels x inner: inner is the positions with channels first, and 1 with channels last.
struct NkWindow {
    int64_t outer, channels, inner;
    int64_t before, after;  // below channels, as nothing lies beyond
    double offset, factor, power;
    int32_t type, reserved;
};

// Global: the energy of each channel, its share of the mean energy, and what the shares make of the input:
//
//     energy = sqrt(sum over positions of x^2),  share = energy / (mean over channels of energy + eps),
//     y = x * (1 + weight * share) + bias.
//
// In memory a tensor is samples x channels x positions, or samples x positions x channels with channels last. Energies are those of a
// sample, or of all samples together where they are shared.
struct NkResponse {
    int64_t samples, channels, positions;
    double eps;
    int32_t type, last;
    int32_t shared;
    int32_t parts;  // NK_WEIGHT | NK_BIAS
};
