// Global response normalization: the energy of each channel, its share of the mean energy, and what the shares make of the input:
//
//     energy = sqrt(sum over positions of x^2),  share = energy / (mean over channels of energy + eps),
//     y = x * (1 + weight * share) + bias.
//
// In memory a tensor is samples x channels x positions, or samples x positions x channels with channels last. Energies are those of a
// sample, or of all samples together where they are shared.
#pragma once
#include "plan.h"

struct NkResponse {
    int64_t samples, channels, positions;
    double eps;
    int32_t type, last;
    int32_t shared;
    int32_t parts;  // NK_WEIGHT | NK_BIAS
};
