// The inner loops of the lanes' backward pass: what a few rows add to the sums, and what the sums make of their dx.
#pragma once
#include "activation.h"
#include "sheet.h"

namespace nk {

template <class A> struct BackwardLine {
    int64_t sheet = -1, tile = -1;  // whose it is
    alignas(64) A center[ROOM], inverse[ROOM];  // of an output, center holds what d is after its bias and weight are undone, over z
    // PER_LANE: dx = g * gain + d * d_gain + d_shift, of z = d * gain + shift.
    alignas(64) A gain[ROOM], shift[ROOM], d_gain[ROOM], d_shift[ROOM];
    // Of the first row, or null; else dx = g * weight * inverse + d * d_gain + d_shift, of z = d * inverse * weight + bias.
    const A *weight, *bias;
    int64_t weight_step, bias_step;
    int32_t kind;
};

// What a row gives: dy times the activation's slope, of each vector.
template <int VARIATION, int KIND, class T> struct Row {
    using A = accumulator<T>;
    const T *dy, *x;
    int64_t width;
    const BackwardLine<A> &line;
    const A *weights, *biases;
    // In variables of their own: what is stored might lie in the line, for all the compiler knows.
    A weight = 1, bias = 0;
    alignas(64) A slopes[KIND == CURVED ? ROOM : 1];

    Row(const T *dy, const T *x, int64_t width, int64_t row, const BackwardLine<A> &line)
        : dy(dy), x(x), width(width), line(line), weights(along(line.weight, row * line.weight_step)),
          biases(along(line.bias, row * line.bias_step)) {
        if constexpr (VARIATION == PER_ROW) weight = *weights, bias = *biases;
        if constexpr (KIND == CURVED) {
            for_vectors(width, [&](auto at) { nk::store(slopes + at.i, z(at, apart(at))); });
            slope_run(line.kind, slopes, width);
        }
    }

    template <class At> Vec<A> gain(At at) const {
        if constexpr (VARIATION == PER_ROW) return splat<A>(weight);
        else return at(weights);
    }
    template <class At> Vec<A> apart(At at) const {
        Vec<A> found = at(x);
        if constexpr (KIND > OUTPUT) return found - at(line.center);
        found = undone<KIND, A>(found);
        if constexpr (VARIATION == PER_LANE) return (found - at(line.shift)) * at(line.center);
        if constexpr (VARIATION == PER_ROW) return (found - bias) * (1 / weight) * at(line.center);
        return (found - at(biases)) / gain(at) * at(line.center);
    }
    template <class At> Vec<A> z(At at, Vec<A> apart) const {
        if constexpr (VARIATION == PER_LANE) return apart * at(line.gain) + at(line.shift);
        Vec<A> normalized = apart * at(line.inverse);
        if constexpr (VARIATION == PER_ROW) return normalized * weight + bias;
        if constexpr (VARIATION == PER_ELEMENT) return normalized * gain(at) + at(biases);
    }
    template <class At> Vec<A> g(At at, Vec<A> apart) const {
        Vec<A> dz = at(dy);
        if constexpr (KIND == NK_RELU) return select<A>(z(at, apart) <= 0, Vec<A>{}, dz);
        if constexpr (KIND == CURVED) return dz * nk::load(slopes + at.i);
        if constexpr (KIND <= OUTPUT) return passed<KIND, A>(at(x), dz);
        return dz;
    }
};

// Adds to the lanes' sums of g and g * d, and gives what the row adds to its parameters: a number of each for PER_ROW, one a lane for
// PER_ELEMENT.
template <int VARIATION, int KIND, class T, class A = accumulator<T>>
void reduce_row(const Row<VARIATION, KIND, T> &row, A *sums, A *products, A *dbeta, A *dgamma) {
    Vec<A> sum = {}, product = {};
    for_vectors(row.width, [&](auto at) {
        Vec<A> apart = row.apart(at), g = at.template only<A>(row.g(at, apart)), scaled = g;
        if constexpr (VARIATION != PER_LANE) {
            Vec<A> normalized = apart * at(row.line.inverse);
            scaled = g * row.gain(at);
            if constexpr (VARIATION == PER_ROW) {
                sum += g;
                product += g * normalized;
            } else {
                nk::store(dbeta + at.i, row.g(at, apart));
                nk::store(dgamma + at.i, row.g(at, apart) * normalized);
            }
        }
        at.put(sums, at(sums) + scaled);
        at.put(products, at(products) + scaled * apart);
    });
    if constexpr (VARIATION == PER_ROW) *dbeta = sum_lanes<A>(sum), *dgamma = sum_lanes<A>(product);
}

// MEASURED: the statistic depends on x.
template <bool MEASURED, int VARIATION, int KIND, class T, class A = accumulator<T>>
void write_dx(const Row<VARIATION, KIND, T> &row, const T *dsum, T *dx, bool far) {
    for_vectors(row.width, [&](auto at) {
        Vec<A> apart = {};
        if constexpr (MEASURED || KIND == NK_RELU) apart = row.apart(at);
        Vec<A> v = row.g(at, apart);
        if constexpr (VARIATION == PER_LANE) v *= at(row.line.gain);
        else v *= row.gain(at) * at(row.line.inverse);
        if constexpr (MEASURED) v += apart * at(row.line.d_gain) + at(row.line.d_shift);
        if (dsum) v += at(dsum);
        at.put(dx, v, far);
    });
}

}  // namespace nk
