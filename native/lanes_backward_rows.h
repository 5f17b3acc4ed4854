// The inner loops of the lanes' backward pass: what a few rows add to the sums, and what the sums make of their dx.
#pragma once
#include "activation.h"
#include "sheet.h"

namespace nk {

template <class A> struct BackwardLine {
    int64_t sheet = -1, tile = -1;  // whose it is
    alignas(64) A center[ROOM], inverse[ROOM];  // of an output, center holds what d is after its bias and weight are undone, over z
    // PER_LANE: dx = g * gain + d * along + offset, of z = d * gain + shift.
    alignas(64) A gain[ROOM], shift[ROOM], along[ROOM], offset[ROOM];
    // Of the first row, or null; else dx = g * weight * inverse + d * along + offset, of z = d * inverse * weight + bias.
    const A *weight, *bias;
    int64_t weight_step, bias_step;
    int32_t kind;
};

// What a few rows give: dy times the activation's slope, of each vector of each row.
template <int VARIATION, int KIND, int ROWS, class T> struct Rows {
    using A = accumulator<T>;
    const T *dy, *x;
    int64_t pitch, width, row;
    const BackwardLine<A> &line;
    // Of each row. In variables of its own: what is stored might lie in the line, for all the compiler knows.
    const A *weights[ROWS], *biases[ROWS];
    A weight[ROWS], bias[ROWS];
    alignas(64) A slopes[KIND == CURVED ? ROWS : 1][KIND == CURVED ? ROOM : 1];

    Rows(const T *dy, const T *x, int64_t pitch, int64_t width, int64_t row, const BackwardLine<A> &line)
        : dy(dy), x(x), pitch(pitch), width(width), row(row), line(line) {
        for (int r = 0; r < ROWS; ++r) {
            weights[r] = along(line.weight, (row + r) * line.weight_step), biases[r] = along(line.bias, (row + r) * line.bias_step);
            if constexpr (VARIATION == PER_ROW) weight[r] = *weights[r], bias[r] = *biases[r];
        }
        if constexpr (KIND == CURVED) {
            for_vectors(width, [&](auto at) {
                for (int r = 0; r < ROWS; ++r) nk::store(slopes[r] + at.i, z(at, r, apart(at, r)));
            });
            for (int r = 0; r < ROWS; ++r) slope_run(line.kind, slopes[r], width);
        }
    }

    // Asks for what is read soon, where rows are long: of three streams at once the processor foresees too little.
    template <class At> void ask(At at) const {
        if constexpr (ROWS > 1) return;
        __builtin_prefetch(x + 3 * pitch + at.i);
        __builtin_prefetch(dy + 3 * pitch + at.i);
    }
    template <class At> Vec<A> apart(At at, int r) const {
        Vec<A> found = at(x + r * pitch);
        if constexpr (KIND > OUTPUT) return found - at(line.center);
        found = undone<KIND, A>(found);
        if constexpr (VARIATION == PER_LANE) return (found - at(line.shift)) * at(line.center);
        if constexpr (VARIATION == PER_ROW) return (found - bias[r]) * (1 / weight[r]) * at(line.center);
        return (found - at(biases[r])) / gain(at, r) * at(line.center);
    }
    template <class At> Vec<A> gain(At at, int r) const {
        if constexpr (VARIATION == PER_ROW) return splat<A>(weight[r]);
        else return at(weights[r]);
    }
    template <class At> Vec<A> z(At at, int r, Vec<A> apart) const {
        if constexpr (VARIATION == PER_LANE) return apart * at(line.gain) + at(line.shift);
        Vec<A> normalized = apart * at(line.inverse);
        if constexpr (VARIATION == PER_ROW) return normalized * weight[r] + bias[r];
        if constexpr (VARIATION == PER_ELEMENT) return normalized * gain(at, r) + at(biases[r]);
    }
    template <class At> Vec<A> g(At at, int r, Vec<A> apart) const {
        Vec<A> found = at(dy + r * pitch);
        if constexpr (KIND == NK_RELU) return select<A>(z(at, r, apart) <= 0, Vec<A>{}, found);
        if constexpr (KIND == CURVED) return found * nk::load(slopes[r] + at.i);
        if constexpr (KIND <= OUTPUT) return passed<KIND, A>(at(x + r * pitch), found);
        return found;
    }
};

// Adds to the lanes' sums, and gives the rows' own: for PER_ROW two sums for each row, for PER_ELEMENT each lane's two.
template <int VARIATION, int KIND, int ROWS, class T, class A = accumulator<T>>
void collect(const Rows<VARIATION, KIND, ROWS, T> &rows, A *sums, A *products, A *own_sums, A *own_products) {
    Vec<A> sum[ROWS] = {}, product[ROWS] = {};
    for_vectors(rows.width, [&](auto at) {
        Vec<A> lane_sum = {}, lane_product = {};
        for (int r = 0; r < ROWS; ++r) {
            rows.ask(at);
            Vec<A> apart = rows.apart(at, r), g = at.template only<A>(rows.g(at, r, apart));
            if constexpr (VARIATION == PER_LANE) {
                lane_sum += g;
                lane_product += g * apart;
            } else {
                Vec<A> normalized = apart * at(rows.line.inverse), scaled = g * rows.gain(at, r);
                lane_sum += scaled;
                lane_product += scaled * apart;
                if constexpr (VARIATION == PER_ROW) {
                    sum[r] += g;
                    product[r] += g * normalized;
                } else {
                    nk::store(own_sums + at.i, rows.g(at, r, apart));
                    nk::store(own_products + at.i, rows.g(at, r, apart) * normalized);
                }
            }
        }
        at.put(sums, at(sums) + lane_sum);
        at.put(products, at(products) + lane_product);
    });
    if constexpr (VARIATION == PER_ROW)
        for (int r = 0; r < ROWS; ++r) own_sums[r] = sum_lanes<A>(sum[r]), own_products[r] = sum_lanes<A>(product[r]);
}

// PULLED: the statistic depends on x.
template <bool PULLED, int VARIATION, int KIND, int ROWS, class T, class A = accumulator<T>>
void spread(const Rows<VARIATION, KIND, ROWS, T> &rows, const T *dsum, T *dx, bool far) {
    for_vectors(rows.width, [&](auto at) {
        Vec<A> found[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            rows.ask(at);
            Vec<A> apart = {};
            if constexpr (PULLED || KIND == NK_RELU) apart = rows.apart(at, r);
            found[r] = rows.g(at, r, apart);
            if constexpr (VARIATION == PER_LANE) found[r] *= at(rows.line.gain);
            else found[r] *= rows.gain(at, r) * at(rows.line.inverse);
            if constexpr (PULLED) found[r] += apart * at(rows.line.along) + at(rows.line.offset);
            if (dsum) found[r] += at(dsum + r * rows.pitch);
        }
        for (int r = 0; r < ROWS; ++r) at.put(dx + r * rows.pitch, found[r], ROWS == 1 && far);
    });
}

}  // namespace nk
