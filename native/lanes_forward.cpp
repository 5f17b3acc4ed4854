// Statistics per lane, from rows far apart, and normalizing by them.
#include "activation.h"
#include "kernels.h"
#include "sheet.h"

namespace nk {
namespace {

constexpr int CURVED = -1;         // an activation that is applied to a run of numbers at a time
constexpr int64_t BLOCK = 64;      // rows that are summed before they are merged
constexpr int64_t DEEP = 8;        // rows that are summed side by side: each takes the sums from memory and back once

template <class T> void add_rows(const T *x, const T *residual, T *sum, int64_t pitch, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row, x += pitch, residual += pitch, sum += pitch)
        for_vectors(width, [&](auto at) { at.store(sum, at.load(x) + at.load(residual)); });
}

// Sums of x - pivot, where CENTRED, and of its square.
template <bool CENTRED, int ROWS, class T, class A = accumulator<T>>
void accumulate(const T *x, int64_t pitch, int64_t width, const A *pivot, A *sums, A *squares) {
    for_vectors(width, [&](auto at) {
        Vec<A> from = CENTRED ? at.load(pivot) : Vec<A>{}, sum[2] = {}, square[2] = {};
        for (int r = 0; r < ROWS; ++r) {
            Vec<A> apart = at.template fresh<A>(at.load(x + r * pitch) - from);
            if (CENTRED) sum[r % 2] += apart;
            square[r % 2] += apart * apart;
        }
        if (CENTRED) at.store(sums, at.load(sums) + (sum[0] + sum[1]));
        at.store(squares, at.load(squares) + (square[0] + square[1]));
    });
}

// Moments of each lane. The mean is pivot + rest, of which rest is what rounding took from the pivot; square as in Moments.
template <class A> struct Found {
    alignas(64) A pivot[ROOM] = {}, rest[ROOM] = {}, square[ROOM] = {};

    // Merges sums about the pivot, of `more` elements in each lane, with the `n` before. The new mean becomes the pivot, so that
    // differences are always taken from a number nearby.
    void merge(bool centred, const A *sums, const A *squares, int64_t n, int64_t more, int64_t width) {
        A each = 1 / A(more), share = A(more) / A(n + more), weight = A(n) * share;
        if (!centred) {
            for (int64_t l = 0; l < width; ++l) square[l] += squares[l];
            return;
        }
        for (int64_t l = 0; l < width; ++l) {
            A mean = sums[l] * each, apart = mean - rest[l];
            square[l] += (squares[l] - sums[l] * mean) + apart * apart * weight;
            A low = rest[l] + apart * share, high = pivot[l] + low, back = high - pivot[l];
            rest[l] = (pivot[l] - (high - back)) + (low - back);
            pivot[l] = high;
        }
    }
};

// Lanes of one statistic, merged: they all get its moments.
template <class A> void merge_groups(const Sheet &sheet, Tile tile, A *pivot, A *rest, A *square) {
    if (sheet.plain()) return;
    sheet.for_sets(tile, [&](auto &&each_lane) {
        auto mean_of = [&](int64_t l) { return double(pivot[l]) + double(rest[l]); };
        double n = 0, mean = 0, total = 0;
        each_lane([&](int64_t l) {
            double m = double(sheet.elements(tile.first + l));
            n += m, mean += m * mean_of(l);
        });
        mean /= n;
        each_lane([&](int64_t l) {
            double apart = mean_of(l) - mean;
            total += double(square[l]) + double(sheet.elements(tile.first + l)) * apart * apart;
        });
        A high = A(mean), low = A(mean - double(high)), all = A(total);
        each_lane([&](int64_t l) { pivot[l] = high, rest[l] = low, square[l] = all; });
    });
}

// z = (x - pivot) * gain + shift; then, but PER_LANE, z * weight + bias.
template <class A> struct Line {
    alignas(64) A pivot[ROOM], gain[ROOM], shift[ROOM];
    // ? of the first row
    const A *weight, *bias;
    int64_t weight_step, bias_step;
};

template <int VARIATION, int KIND, int ROWS, class T, class A = accumulator<T>>
void write(const T *x, T *y, int64_t pitch, int64_t width, const Line<A> &line, int64_t row, int32_t kind) {
    A weight[ROWS], bias[ROWS];
    if constexpr (VARIATION == PER_ROW)
        for (int r = 0; r < ROWS; ++r) {
            weight[r] = line.weight ? line.weight[(row + r) * line.weight_step] : A(1);
            bias[r] = line.bias ? line.bias[(row + r) * line.bias_step] : A(0);
        }
    auto each_z = [&](auto &&take) {
        for_vectors(width, [&](auto at) {
            Vec<A> pivot = at.load(line.pivot), gain = at.load(line.gain), shift = at.load(line.shift);
            for (int r = 0; r < ROWS; ++r) {
                Vec<A> z = (at.load(x + r * pitch) - pivot) * gain + shift;
                if constexpr (VARIATION == PER_ROW) z = z * weight[r] + bias[r];
                if constexpr (VARIATION == PER_ELEMENT)
                    z = z * at.load(line.weight + (row + r) * line.weight_step) + at.load(line.bias + (row + r) * line.bias_step);
                take(at, r, z);
            }
        });
    };
    if constexpr (KIND != CURVED) {
        each_z([&](auto at, int r, Vec<A> z) { at.store(y + r * pitch, activate<KIND, A>(z)); });
    } else {
        alignas(64) A run[ROWS][ROOM];
        each_z([&](auto at, int r, Vec<A> z) { nk::store(run[r] + at.lane, z); });
        for (int r = 0; r < ROWS; ++r) activate_run(kind, run[r], width);
        for_vectors(width, [&](auto at) {
            for (int r = 0; r < ROWS; ++r) at.store(y + r * pitch, nk::load(run[r] + at.lane));
        });
    }
}

template <class A> void inverse_scales(const NkPlan &plan, const A *square, A *inverse, int64_t n) {
    NkPlan p = plan;  // a copy, which the stores cannot change
    for (int64_t i = 0; i < n; ++i) inverse[i] = inverse_scale<A>(p, square[i]);
}

template <class T> class Pass {
    using A = accumulator<T>;

    const NkPlan &plan;
    Sheet sheet;
    Cut cut;
    Parameters<A> parameters;
    const Forward<T> &call;
    const A *weight, *bias;
    const T *x;          // what is normalized
    A *partial, *whole;  // moments of a batch's lanes: of each chunk, and of the sheet

public:
    Pass(const NkPlan &plan, const Forward<T> &call)
        : plan(plan), sheet(plan, Parameters<A>::bound_to_rows(plan)), cut(sheet, sizeof(T)), parameters(plan, sheet), call(call),
          x(call.residual ? call.sum : call.x) {
        weight = parameters.lay_out(call.weight, call.scratch);
        bias = parameters.lay_out(call.bias, call.scratch + parameters.room());
        if (weight == nullptr && bias == nullptr) parameters.variation = PER_LANE;
        partial = call.scratch + 2 * parameters.room();
        whole = partial + cut.batch * cut.chunks * 3 * sheet.lanes;
    }
    static int64_t scratch(const NkPlan &plan) {
        Sheet sheet(plan, Parameters<A>::bound_to_rows(plan));
        Cut cut(sheet, sizeof(T));
        return 2 * Parameters<A>(plan, sheet).room() + (cut.at_once ? 0 : cut.batch * (cut.chunks + 1) * 3 * sheet.lanes);
    }

    void run() {
        if (plan.given) return each_piece(0, sheet.outer, [&](int64_t o, int64_t chunk, Tile tile) { normalize_given(o, chunk, tile); });
        if (cut.at_once)
            return each_piece(0, sheet.outer, [&](int64_t o, int64_t chunk, Tile tile) {
                Found<A> found;
                gather(o, chunk, tile, found);
                settle(o, tile, found.pivot, found.rest, found.square);
                normalize(o, chunk, tile, found.pivot, found.rest, found.square);
            });
        for (int64_t begin = 0; begin < sheet.outer; begin += cut.batch) {
            int64_t end = std::min(sheet.outer, begin + cut.batch);
            each_piece(begin, end, [&](int64_t o, int64_t chunk, Tile tile) {
                Found<A> found;
                gather(o, chunk, tile, found);
                A *to = partial + ((o - begin) * cut.chunks + chunk) * 3 * sheet.lanes + tile.first;
                std::copy(found.pivot, found.pivot + tile.width, to);
                std::copy(found.rest, found.rest + tile.width, to + sheet.lanes);
                std::copy(found.square, found.square + tile.width, to + 2 * sheet.lanes);
            });
            merge_chunks(begin, end);
            // Backwards: what was read last is still near.
            each_piece<true>(begin, end, [&](int64_t o, int64_t chunk, Tile tile) {
                const A *moments = whole + (o - begin) * 3 * sheet.lanes + tile.first;
                normalize(o, chunk, tile, moments, moments + sheet.lanes, moments + 2 * sheet.lanes);
            });
        }
    }

private:
    template <bool BACKWARDS = false, class Each> void each_piece(int64_t begin, int64_t end, Each &&each) {
        int64_t pieces = cut.chunks * cut.tiles;
        for_ranges((end - begin) * pieces, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                int64_t task = BACKWARDS ? first + last - 1 - i : i;
                each(begin + task / pieces, task % pieces / cut.tiles, cut.tile(sheet, task % cut.tiles));
            }
        });
    }
    int64_t place(int64_t o, Span span, Tile tile) const { return o * sheet.size + span.first * sheet.lanes + tile.first; }

    void gather(int64_t o, int64_t chunk, Tile tile, Found<A> &found) {
        Span span(sheet, cut, chunk);
        int64_t at = place(o, span, tile), n = 0;
        auto take = [&](int64_t rows, int64_t width) {
            if (call.residual) add_rows(call.x + at, call.residual + at, call.sum + at, sheet.lanes, std::min(rows, DEEP), width);
            if (n == 0 && plan.centred)
                for (int64_t l = 0; l < width; ++l) found.pivot[l] = widen(x[at + l]);
            alignas(64) A sums[ROOM] = {}, squares[ROOM] = {};
            for (int64_t row = 0; row < rows;) {
                int64_t deep = std::min(rows - row, DEEP);
                if (call.residual && row > 0)
                    add_rows(call.x + at, call.residual + at, call.sum + at, sheet.lanes, deep, width);
                accumulate(x + at, deep, width, found.pivot, sums, squares);
                row += deep, at += deep * sheet.lanes;
            }
            // Whole vectors: beyond the width are zeros; but for the short row, beyond which are lanes.
            found.merge(plan.centred, sums, squares, n, rows, width == tile.width ? (width + LANES - 1) / LANES * LANES : width);
            n += rows;
        };
        for (int64_t row = 0; row < span.rows; row += BLOCK) take(std::min(BLOCK, span.rows - row), tile.width);
        if (span.last) take(1, span.last);
    }
    void accumulate(const T *p, int64_t rows, int64_t width, const A *pivot, A *sums, A *squares) {
        auto run = [&](auto centred) {
            constexpr bool CENTRED = decltype(centred)::value;
            if (rows == DEEP) return nk::accumulate<CENTRED, DEEP>(p, sheet.lanes, width, pivot, sums, squares);
            for (int64_t row = 0; row < rows; ++row) nk::accumulate<CENTRED, 1>(p + row * sheet.lanes, sheet.lanes, width, pivot, sums, squares);
        };
        plan.centred ? run(std::true_type{}) : run(std::false_type{});
    }

    // From the moments of lanes to those of their statistics, which are written; the square becomes 1 / scale.
    void settle(int64_t o, Tile tile, A *pivot, A *rest, A *square) {
        merge_groups(sheet, tile, pivot, rest, square);
        int64_t from = o * plan.kept + tile.first / sheet.group;
        auto put = [&](A *to, A *of, A divisor) {
            if (to == nullptr) return;
            for (int64_t l = 0; l < std::min(tile.width, sheet.period); l += sheet.group) to[from + l / sheet.group] = of[l] / divisor;
        };
        put(call.center, pivot, 1);
        put(call.variance, square, A(set_size(plan)));
        for (int64_t l = 0; l < tile.width; ++l) square[l] = square[l] < 0 ? A(0) : square[l];
        inverse_scales(plan, square, square, tile.width);
        put(call.inverse, square, 1);
    }

    void merge_chunks(int64_t begin, int64_t end) {
        for_each((end - begin) * cut.tiles, [&](int64_t task) {
            Tile tile = cut.tile(sheet, task % cut.tiles);
            double mean[WIDEST] = {}, square[WIDEST] = {};
            auto each_chunk = [&](auto &&take) {
                for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
                    Span span(sheet, cut, chunk);
                    const A *p = partial + (task / cut.tiles * cut.chunks + chunk) * 3 * sheet.lanes + tile.first;
                    for (int64_t l = 0; l < tile.width; ++l)
                        take(l, double(span.rows + (tile.first + l < span.last)), double(p[l]) + double(p[l + sheet.lanes]), double(p[l + 2 * sheet.lanes]));
                }
            };
            each_chunk([&](int64_t l, double n, double m, double) { mean[l] += n * m; });
            for (int64_t l = 0; l < tile.width; ++l) mean[l] /= double(sheet.elements(tile.first + l));
            each_chunk([&](int64_t l, double n, double m, double s) { square[l] += s + n * (m - mean[l]) * (m - mean[l]); });
            A *to = whole + task / cut.tiles * 3 * sheet.lanes + tile.first;
            for (int64_t l = 0; l < tile.width; ++l) {
                to[l] = A(mean[l]);
                to[l + sheet.lanes] = A(mean[l] - double(to[l]));
                to[l + 2 * sheet.lanes] = A(square[l]);
            }
        });
        for_each(end - begin, [&](int64_t i) {
            A *moments = whole + i * 3 * sheet.lanes;
            settle(begin + i, {0, sheet.lanes}, moments, moments + sheet.lanes, moments + 2 * sheet.lanes);
        });
    }

    void normalize_given(int64_t o, int64_t chunk, Tile tile) {
        A pivot[WIDEST], rest[WIDEST] = {}, inverse[WIDEST];
        for (int64_t l = 0; l < tile.width; ++l) {
            int64_t statistic = o * plan.kept + sheet.statistic(tile.first + l);
            pivot[l] = plan.centred && call.center ? call.center[statistic] : A(0);
            inverse[l] = call.inverse[statistic];
        }
        normalize(o, chunk, tile, pivot, rest, inverse);
    }

    void normalize(int64_t o, int64_t chunk, Tile tile, const A *pivot, const A *rest, const A *inverse) {
        Span span(sheet, cut, chunk);
        Line<A> line;
        A ones[ROOM], zeros[ROOM];
        bool direct = parameters.variation == PER_LANE;
        int64_t parameter = parameters.place(o) + span.first * parameters.row_step + tile.first * parameters.lane_step;
        line.weight = weight ? weight + parameter : nullptr;
        line.bias = bias ? bias + parameter : nullptr;
        for (int64_t l = 0; l < tile.width; ++l) {
            line.pivot[l] = pivot[l];
            line.gain[l] = direct && weight ? inverse[l] * line.weight[l * parameters.lane_step] : inverse[l];
            line.shift[l] = (direct && bias ? line.bias[l * parameters.lane_step] : A(0)) - rest[l] * line.gain[l];
        }
        line.weight_step = line.bias_step = parameters.row_step;
        if (parameters.variation == PER_ELEMENT) {
            if (!weight) std::fill(ones, ones + ROOM, A(1)), line.weight = ones, line.weight_step = 0;
            if (!bias) std::fill(zeros, zeros + ROOM, A(0)), line.bias = zeros, line.bias_step = 0;
        }
        write_rows(place(o, span, tile), span, tile, line);
    }

    void write_rows(int64_t place, Span span, Tile tile, const Line<A> &line) {
        auto run = [&](auto variation, auto kind) {
            constexpr int VARIATION = decltype(variation)::value, KIND = decltype(kind)::value, MANY = KIND == CURVED ? 1 : 2;
            auto some = [&](auto count, int64_t row, int64_t width) {
                constexpr int ROWS = decltype(count)::value;
                int64_t at = place + row * sheet.lanes;
                if (plan.given && call.residual) add_rows(call.x + at, call.residual + at, call.sum + at, sheet.lanes, ROWS, width);
                nk::write<VARIATION, KIND, ROWS>(x + at, call.y + at, sheet.lanes, width, line, row, plan.activation);
            };
            int64_t row = 0;
            for (; row + MANY <= span.rows; row += MANY) some(std::integral_constant<int, MANY>{}, row, tile.width);
            for (; row < span.rows; ++row) some(std::integral_constant<int, 1>{}, row, tile.width);
            if (span.last) some(std::integral_constant<int, 1>{}, row, span.last);
        };
        auto with_variation = [&](auto kind) {
            if (parameters.variation == PER_LANE) run(std::integral_constant<int, PER_LANE>{}, kind);
            else if (parameters.variation == PER_ROW) run(std::integral_constant<int, PER_ROW>{}, kind);
            else run(std::integral_constant<int, PER_ELEMENT>{}, kind);
        };
        if (plan.activation == NK_LINEAR) with_variation(std::integral_constant<int, NK_LINEAR>{});
        else if (plan.activation == NK_RELU) with_variation(std::integral_constant<int, NK_RELU>{});
        else with_variation(std::integral_constant<int, CURVED>{});
    }
};

}  // namespace

template <class T> void lanes_forward(const NkPlan &plan, const Forward<T> &call) { Pass<T>(plan, call).run(); }

template void lanes_forward(const NkPlan &, const Forward<float> &);
template void lanes_forward(const NkPlan &, const Forward<double> &);
template void lanes_forward(const NkPlan &, const Forward<bfloat16> &);
template void lanes_forward(const NkPlan &, const Forward<float16> &);

int64_t lanes_forward_scratch(const NkPlan &plan) {
    switch (plan.type) {
        case NK_FLOAT32: return Pass<float>::scratch(plan);
        case NK_FLOAT64: return Pass<double>::scratch(plan);
        default: return Pass<float16>::scratch(plan);
    }
}

int64_t lanes_scratch(const NkPlan &plan, bool backward) { return backward ? lanes_backward_scratch(plan) : lanes_forward_scratch(plan); }

}  // namespace nk
