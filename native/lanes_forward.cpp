// Statistics per lane, from rows far apart, and normalizing by them.
#include "activation.h"
#include "kernels.h"
#include "room.h"
#include "sheet.h"

namespace nk {
namespace {

constexpr int64_t BLOCK = 64;  // rows that are summed before they are merged
constexpr int64_t FIRST = 8;   // rows whose mean is the first pivot
constexpr int64_t DEEP = 4;    // rows that are summed side by side: each takes the sums from memory and back once

// Sums of x - pivot, where CENTRED, and of its square.
template <bool CENTRED, int ROWS, class T, class A = accumulator<T>>
void accumulate(const T *x, int64_t pitch, int64_t width, const A *pivot, A *sums, A *squares) {
    // Side by side, rows are no stream that the processor foresees: the rows behind them are fetched in the order of memory.
    const bool ahead = ROWS > 1 && width == pitch;
    for_vectors(width, [&](auto at) {
        if (ahead) fetch<ROWS * LANES>(x + ROWS * (pitch + at.i));
        Vec<A> from = CENTRED ? at(pivot) : Vec<A>{}, sum[2] = {}, square[2] = {};
        for (int r = 0; r < ROWS; ++r) {
            Vec<A> apart = at.template only<A>(at(x + r * pitch) - from);
            if (CENTRED) sum[r % 2] += apart;
            square[r % 2] += apart * apart;
        }
        if (CENTRED) at.put(sums, at(sums) + (sum[0] + sum[1]));
        at.put(squares, at(squares) + (square[0] + square[1]));
    });
}

// Whether asked(sum, square) holds for any lane.
template <class A, class Asked> bool any_lane(const A *sums, const A *squares, int64_t width, Asked &&asked) {
    Vec<A> where{};
    for_vectors(width, [&](auto at) {
        where += at.template only<A>(select<A>(asked(at(sums), at(squares)), splat<A>(1), Vec<A>{}));
    });
    return sum_lanes<A>(where) > 0;
}

// The same for all rows of a block, in double, for squares that float can't hold.
template <class T, class A = accumulator<T>>
void accumulate_wide(const T *x, int64_t pitch, int64_t rows, int64_t width, const A *pivot, double *sums, double *squares) {
    for (int64_t row = 0; row < rows; ++row, x += pitch)
        for (int64_t l = 0; l < width; ++l) {
            double apart = double(widen(x[l])) - double(pivot[l]);
            sums[l] += apart;
            squares[l] += apart * apart;
        }
}

// Moments of each lane. The mean is pivot + rest, of which rest is what rounding took from the pivot; square as in Moments.
template <class A> struct LaneMoments {
    alignas(64) A pivot[ROOM], rest[ROOM];
    alignas(64) double square[ROOM];

    explicit LaneMoments(int64_t width) {
        std::fill_n(pivot, in_vectors(width), A(0));
        std::fill_n(rest, in_vectors(width), A(0));
        std::fill_n(square, in_vectors(width), 0.0);
    }
    // Merges sums about the pivot, of `more` elements in each lane, with the `n` before. The new mean becomes the pivot, so that
    // differences are always taken from a number nearby.
    template <class S> void merge(bool centred, const S *sums, const S *squares, int64_t n, int64_t more, int64_t width) {
        if (!centred) {
            for (int64_t l = 0; l < width; ++l) square[l] += double(squares[l]);
            return;
        }
        const double each = 1 / double(more), share = double(more) / double(n + more), weight = double(n) * share;
        for (int64_t l = 0; l < width; ++l) {
            double sum = double(sums[l]), mean = sum * each, apart = mean - double(rest[l]);
            square[l] += (double(squares[l]) - sum * mean) + apart * apart * weight;
            double low = double(rest[l]) + apart * share;
            A high = A(double(pivot[l]) + low);
            rest[l] = A((double(pivot[l]) - double(high)) + low);
            pivot[l] = high;
        }
    }
};

// Lanes of one statistic, merged: they all get its moments.
template <class A> void merge_groups(const Sheet &sheet, Tile tile, A *pivot, A *rest, double *square) {
    if (sheet.plain()) return;
    auto mean_of = [&](int64_t l) { return double(pivot[l]) + double(rest[l]); };
    if (sheet.group == 1) {
        // Lanes of one statistic lie a period apart: all statistics side by side, so that the loops are vectorized.
        double mean[WIDEST], total[WIDEST];
        std::fill_n(mean, sheet.period, 0.0);
        std::fill_n(total, sheet.period, 0.0);
        auto each_lane = [&](auto &&use) {
            for (int64_t from = 0; from < sheet.lanes; from += sheet.period)
                for (int64_t k = 0; k < sheet.period; ++k) use(k, from + k);
        };
        each_lane([&](int64_t k, int64_t l) { mean[k] += double(sheet.elements(l)) * mean_of(l); });
        for (int64_t k = 0; k < sheet.period; ++k) mean[k] /= double(sheet.far);
        each_lane([&](int64_t k, int64_t l) {
            double apart = mean_of(l) - mean[k];
            total[k] += square[l] + double(sheet.elements(l)) * apart * apart;
        });
        each_lane([&](int64_t k, int64_t l) { pivot[l] = A(mean[k]), rest[l] = A(mean[k] - double(A(mean[k]))), square[l] = total[k]; });
        return;
    }
    sheet.for_sets(tile, [&](auto &&each_lane) {
        double n = 0, mean = 0, total = 0;
        each_lane([&](int64_t l) {
            double m = double(sheet.elements(tile.first + l));
            n += m, mean += m * mean_of(l);
        });
        mean /= n;
        each_lane([&](int64_t l) {
            double apart = mean_of(l) - mean;
            total += square[l] + double(sheet.elements(tile.first + l)) * apart * apart;
        });
        A high = A(mean), low = A(mean - double(high));
        each_lane([&](int64_t l) { pivot[l] = high, rest[l] = low, square[l] = total; });
    });
}

// z = (x - pivot) * gain + shift; then, but PER_LANE, z * weight + bias.
template <class A> struct ForwardLine {
    int64_t sheet = -1, tile = -1;  // whose it is
    alignas(64) A pivot[ROOM], gain[ROOM], shift[ROOM];
    A ones[ROOM], zeros[ROOM];
    const A *weight, *bias;  // of the first row; PER_LANE in gain and shift already
    int64_t weight_step, bias_step;
};

// A row, in the order of memory: the processor foresees no other order as well, and asking for lines ahead takes longer than waiting.
template <int VARIATION, int KIND, class T, class A = accumulator<T>>
void write(const T *x, T *y, int64_t width, const ForwardLine<A> &line, int64_t row, int32_t kind, bool far) {
    const A *weights = along(line.weight, row * line.weight_step), *biases = along(line.bias, row * line.bias_step);
    // In variables of their own: what is stored might lie in the line, for all the compiler knows.
    A weight = VARIATION == PER_ROW ? *weights : A(1), bias = VARIATION == PER_ROW ? *biases : A(0);
    auto each_z = [&](auto &&take) {
        for_vectors(width, [&](auto at) {
            Vec<A> z = (at(x) - at(line.pivot)) * at(line.gain) + at(line.shift);
            if constexpr (VARIATION == PER_ROW) z = z * weight + bias;
            if constexpr (VARIATION == PER_ELEMENT) z = z * at(weights) + at(biases);
            take(at, z);
        });
    };
    if constexpr (KIND != CURVED) {
        each_z([&](auto at, Vec<A> z) { at.put(y, activate<KIND, A>(z), far); });
    } else {
        alignas(64) A run[ROOM];
        each_z([&](auto at, Vec<A> z) { nk::store(run + at.i, z); });
        activate_run(kind, run, width);
        for_vectors(width, [&](auto at) { at.put(y, nk::load(run + at.i), far); });
    }
}

template <class T> class LanesForward {
    using A = accumulator<T>;

    const NkPlan &plan;
    Sheet sheet;
    Cut cut;
    Parameters<A> parameters;
    const Forward<T> &call;
    const Range range;  // of a block
    const T *x;         // what is normalized
    const bool far;     // y is written past the cache
    Room<A, 2048> room;
    Room<double> square_room;
    const A *weight, *bias;
    // Moments of a batch's lanes, of each chunk: pivot and rest, square; of the sheet: pivot, rest and 1 / scale, square.
    A *partial, *whole;
    double *partial_square, *whole_square;

public:
    LanesForward(const NkPlan &plan, const Forward<T> &call)
        : plan(plan), sheet(plan), cut(sheet, sizeof(T)), parameters(plan, sheet), call(call),
          range(Range::of<A>(plan, std::min(sheet.rows, BLOCK))), x(call.residual ? call.sum : call.x),
          far(x != call.y && cut.streams(plan, sheet, call.y)) {
        int64_t table = parameters.room(), lanes = cut.at_once ? 0 : cut.batch * sheet.lanes;
        A *scratch = room.take(2 * table + lanes * (2 * cut.chunks + 3));
        weight = parameters.lay_out(call.weight, scratch);
        bias = parameters.lay_out(call.bias, scratch + table);
        if (weight == nullptr && bias == nullptr) parameters.variation = PER_LANE;
        partial = scratch + 2 * table;
        whole = partial + lanes * 2 * cut.chunks;
        partial_square = square_room.take(lanes * (cut.chunks + 1));
        whole_square = partial_square + lanes * cut.chunks;
    }

    void run() {
        int64_t grain = grain_of(sheet.size / (cut.chunks * cut.tiles));
        if (plan.given)
            return for_pieces<ForwardLine<A>>(cut, 0, sheet.outer, grain, [&](ForwardLine<A> &line, int64_t o, int64_t chunk, int64_t index) {
                write_piece(line, o, chunk, index, [&](Tile tile, auto &&use) {
                    A pivot[WIDEST], rest[WIDEST] = {}, inverse[WIDEST];
                    sheet.each_statistic(tile, [&](int64_t l, int64_t k) {
                        pivot[l] = plan.centred && call.center ? call.center[o * plan.kept + k] : A(0);
                        inverse[l] = call.inverse[o * plan.kept + k];
                    });
                    use(pivot, rest, inverse);
                });
            });
        if (cut.at_once)
            return for_pieces<ForwardLine<A>>(cut, 0, sheet.outer, grain, [&](ForwardLine<A> &line, int64_t o, int64_t chunk, int64_t index) {
                write_piece(line, o, chunk, index, [&](Tile tile, auto &&use) {
                    LaneMoments<A> moments(tile.width);
                    A inverse[ROOM];
                    measure(o, chunk, tile, moments);
                    finalize(o, tile, moments.pivot, moments.rest, moments.square, inverse);
                    use(moments.pivot, moments.rest, inverse);
                });
            });
        for (int64_t begin = 0; begin < sheet.outer; begin += cut.batch)
            in_steps<ForwardLine<A>>(
                sheet, cut, begin, std::min(sheet.outer, begin + cut.batch),
                [&](auto &, int64_t o, int64_t chunk, int64_t index) {
                    Tile tile = cut.tile(sheet, index);
                    LaneMoments<A> moments(tile.width);
                    measure(o, chunk, tile, moments);
                    int64_t at = ((o - begin) * cut.chunks + chunk) * sheet.lanes;
                    A *to = partial + 2 * at + tile.first;
                    std::copy(moments.pivot, moments.pivot + tile.width, to);
                    std::copy(moments.rest, moments.rest + tile.width, to + sheet.lanes);
                    std::copy(moments.square, moments.square + tile.width, partial_square + at + tile.first);
                },
                [&](int64_t o) { merge_chunks(o, o - begin); },
                [&](auto &line, int64_t o, int64_t chunk, int64_t index) {
                    write_piece(line, o, chunk, index, [&](Tile tile, auto &&use) {
                        const A *moments = whole + (o - begin) * 3 * sheet.lanes + tile.first;
                        use(moments, moments + sheet.lanes, moments + 2 * sheet.lanes);
                    });
                });
    }

private:
    int64_t place(int64_t o, Span span, Tile tile) const { return o * sheet.size + span.first * sheet.lanes + tile.first; }

    void measure(int64_t o, int64_t chunk, Tile tile, LaneMoments<A> &moments) {
        Span span(sheet, cut, chunk);
        int64_t at = place(o, span, tile), n = 0;
        auto take = [&](int64_t rows, int64_t width) {
            for (int64_t row = 0, from = at; call.residual && row < rows; ++row, from += sheet.lanes)
                for_vectors(width, [&](auto v) { v.put(call.sum + from, v(call.x + from) + v(call.residual + from)); });
            if (n == 0 && plan.centred) first_pivot(x + at, std::min(rows, FIRST), width, moments.pivot);
            alignas(64) A sums[ROOM], squares[ROOM];
            for (int attempt = 1;; ++attempt) {
                std::fill_n(sums, in_vectors(width), A(0));
                std::fill_n(squares, in_vectors(width), A(0));
                accumulate(x + at, rows, width, moments.pivot, sums, squares);
                if (attempt == 2 || n > 0 || !plan.centred || !far_off(sums, squares, rows, width)) break;
                for (int64_t l = 0; l < width; ++l) moments.pivot[l] += sums[l] / A(rows);
            }
            const Vec<A> least = splat<A>(A(range.least)), most = splat<A>(A(range.most));
            if (any_lane(sums, squares, width, [&](Vec<A>, Vec<A> square) { return (square < least) | (square > most); })) {
                double wide_sums[ROOM] = {}, wide_squares[ROOM] = {};
                accumulate_wide(x + at, sheet.lanes, rows, width, moments.pivot, wide_sums, wide_squares);
                moments.merge(plan.centred, wide_sums, wide_squares, n, rows, width);
            } else {
                // Whole vectors: beyond the width are zeros; but for the short row, beyond which are lanes.
                moments.merge(plan.centred, sums, squares, n, rows, width == tile.width ? in_vectors(width) : width);
            }
            n += rows, at += rows * sheet.lanes;
        };
        for (int64_t row = 0; row < span.rows; row += BLOCK) take(std::min(BLOCK, span.rows - row), tile.width);
        if (span.last) take(1, span.last);
    }

    // The first pivot: the mean of a few rows. About the first row alone, an outlier there would cost as many digits as its square has.
    // Differences from that row make it exact where all elements are equal.
    void first_pivot(const T *from, int64_t rows, int64_t width, A *pivot) const {
        const A each = 1 / A(rows);
        for_vectors(width, [&](auto at) {
            Vec<A> first = at(from), sum{};
            for (int64_t row = 1; row < rows; ++row) sum += at(from + row * sheet.lanes) - first;
            at.put(pivot, first + sum * each);
        });
    }

    // Whether a lane's mean is so far from the pivot that its variance comes out of a difference of larger numbers. The mean of eight rows
    // is off by more than this for one lane in ten thousand.
    static bool far_off(const A *sums, const A *squares, int64_t rows, int64_t width) {
        const A each = 1 / A(rows);
        return any_lane(sums, squares, width, [&](Vec<A> sum, Vec<A> square) {
            Vec<A> lost = sum * sum * each;
            return lost > 2 * (square - lost);
        });
    }

    void accumulate(const T *p, int64_t rows, int64_t width, const A *pivot, A *sums, A *squares) {
        auto run = [&](auto centred) {
            constexpr bool CENTRED = decltype(centred)::value;
            int64_t row = 0;
            for (; row + DEEP <= rows; row += DEEP)
                nk::accumulate<CENTRED, DEEP>(p + row * sheet.lanes, sheet.lanes, width, pivot, sums, squares);
            for (; row < rows; ++row) nk::accumulate<CENTRED, 1>(p + row * sheet.lanes, sheet.lanes, width, pivot, sums, squares);
        };
        plan.centred ? run(std::true_type{}) : run(std::false_type{});
    }

    // From the moments of lanes to those of their statistics, which are written, and to 1 / scale of each lane.
    void finalize(int64_t o, Tile tile, A *pivot, A *rest, double *square, A *inverse) {
        merge_groups(sheet, tile, pivot, rest, square);
        const int64_t period = std::min(tile.width, sheet.period);  // behind it the same statistics again
        for (int64_t l = 0; l < period; ++l) square[l] = square[l] < 0 ? 0 : square[l];
        int64_t from = o * plan.kept + tile.first / sheet.group;
        auto put = [&](A *to, auto *of, double share) {
            if (to == nullptr) return;
            for (int64_t l = 0; l < period; l += sheet.group) to[from + l / sheet.group] = A(of[l] * share);
        };
        put(call.center, pivot, 1);
        put(call.variance, square, 1 / double(set_size(plan)));
        inverse_scales(plan, square, inverse, period);
        for (int64_t l = period; l < tile.width; l += period) std::copy_n(inverse, period, inverse + l);
        put(call.inverse, inverse, 1);
    }

    // From the moments of a sheet's chunks to those of its lanes and of their statistics.
    void merge_chunks(int64_t o, int64_t at) {
        A *moments = whole + at * 3 * sheet.lanes;
        double *square = whole_square + at * sheet.lanes;
        std::fill_n(square, sheet.lanes, 0.0);
        for (int64_t index = 0; index < cut.tiles; ++index) {
            Tile tile = cut.tile(sheet, index);
            double mean[WIDEST] = {};
            auto each_chunk = [&](auto &&take) {
                for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
                    Span span(sheet, cut, chunk);
                    int64_t from = (at * cut.chunks + chunk) * sheet.lanes + tile.first;
                    const A *p = partial + from + (at * cut.chunks + chunk) * sheet.lanes;
                    for (int64_t l = 0; l < tile.width; ++l) {
                        double n = double(span.rows + (tile.first + l < span.last));
                        take(l, n, double(p[l]) + double(p[l + sheet.lanes]), partial_square[from + l]);
                    }
                }
            };
            each_chunk([&](int64_t l, double n, double m, double) { mean[l] += n * m; });
            for (int64_t l = 0; l < tile.width; ++l) mean[l] /= double(sheet.elements(tile.first + l));
            double *to = square + tile.first;
            each_chunk([&](int64_t l, double n, double m, double s) { to[l] += s + n * (m - mean[l]) * (m - mean[l]); });
            for (int64_t l = 0; l < tile.width; ++l) {
                A high = moments[tile.first + l] = A(mean[l]);
                moments[tile.first + l + sheet.lanes] = A(mean[l] - double(high));
            }
        }
        finalize(o, {0, sheet.lanes}, moments, moments + sheet.lanes, square, moments + 2 * sheet.lanes);
    }

    // with_moments(tile, use) passes pivot, rest and 1 / scale of a tile's lanes to `use`; it is called where the line is of another tile.
    template <class With> void write_piece(ForwardLine<A> &line, int64_t o, int64_t chunk, int64_t index, With &&with_moments) {
        Span span(sheet, cut, chunk);
        Tile tile = cut.tile(sheet, index);
        bool direct = parameters.variation == PER_LANE;
        int64_t parameter = parameters.place(o) + span.first * parameters.row_step + tile.first * parameters.lane_step;
        line.weight = weight ? weight + parameter : nullptr;
        line.bias = bias ? bias + parameter : nullptr;
        line.weight_step = line.bias_step = parameters.row_step;
        if (line.sheet != o || line.tile != tile.first) {
            line.sheet = o, line.tile = tile.first;
            with_moments(tile, [&](const A *pivot, const A *rest, const A *inverse) {
                const A *w = direct ? line.weight : nullptr, *b = direct ? line.bias : nullptr;
                A *__restrict gain = line.gain, *__restrict shift = line.shift;
                std::copy_n(pivot, tile.width, line.pivot);
                for (int64_t l = 0; l < tile.width; ++l) gain[l] = w ? inverse[l] * w[l * parameters.lane_step] : inverse[l];
                for (int64_t l = 0; l < tile.width; ++l) shift[l] = (b ? b[l * parameters.lane_step] : A(0)) - rest[l] * gain[l];
            });
            if (!direct) std::fill(line.ones, line.ones + ROOM, A(1)), std::fill(line.zeros, line.zeros + ROOM, A(0));
        }
        if (!direct && !weight) line.weight = line.ones, line.weight_step = 0;
        if (!direct && !bias) line.bias = line.zeros, line.bias_step = 0;
        write_rows(place(o, span, tile), span, tile, line);
    }

    void write_rows(int64_t place, Span span, Tile tile, const ForwardLine<A> &line) {
        if (call.y == nullptr) return;
        with_constants(parameters.variation, plan.activation, [&](auto variation, auto kind) {
            for (int64_t row = 0; row < span.rows + (span.last != 0); ++row, place += sheet.lanes)
                nk::write<variation, kind>(x + place, call.y + place, row < span.rows ? tile.width : span.last, line, row, plan.activation, far);
        });
    }
};

}  // namespace

template <class T> void lanes_forward(const NkPlan &plan, const Forward<T> &call) { LanesForward<T>(plan, call).run(); }

#define MAKE(T) template void lanes_forward<T>(const NkPlan &, const Forward<T> &);
NK_EACH_TYPE(MAKE)

}  // namespace nk
