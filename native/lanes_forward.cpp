// Statistics per lane, from rows far apart, and normalizing by them.
#include "activation.h"
#include "kernels.h"
#include "room.h"
#include "sheet.h"

namespace nk {
namespace {

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

// Whether asked(sum, square) holds for any lane.
template <class A, class Asked> bool any_lane(const A *sums, const A *squares, int64_t width, Asked &&asked) {
    Vec<A> found{};
    for_vectors(width, [&](auto at) {
        found += at.template fresh<A>(select<A>(asked(at.load(sums), at.load(squares)), splat<A>(1), Vec<A>{}));
    });
    return sum_lanes<A>(found) > 0;
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
template <class A> struct Found {
    alignas(64) A pivot[ROOM], rest[ROOM];
    alignas(64) double square[ROOM];

    explicit Found(int64_t width) {
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
template <class A> struct Line {
    alignas(64) A pivot[ROOM], gain[ROOM], shift[ROOM];
    const A *weight, *bias;  // of the first row, or null
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

template <class T> class Pass {
    using A = accumulator<T>;

    const NkPlan &plan;
    Sheet sheet;
    Cut cut;
    Parameters<A> parameters;
    const Forward<T> &call;
    const Range range;  // of a block
    const T *x;         // what is normalized
    Room<A, 2048> room;
    Room<double> square_room;
    const A *weight, *bias;
    // Moments of a batch's lanes, of each chunk: pivot and rest, square; of the sheet: pivot, rest and 1 / scale, square.
    A *partial, *whole;
    double *partial_square, *whole_square;

public:
    Pass(const NkPlan &plan, const Forward<T> &call)
        : plan(plan), sheet(plan, Parameters<A>::bound_to_rows(plan)), cut(sheet, sizeof(T)), parameters(plan, sheet), call(call),
          range(Range::of<A>(plan, std::min(sheet.rows, BLOCK))), x(call.residual ? call.sum : call.x) {
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
        if (plan.given) return each_piece(0, sheet.outer, [&](int64_t o, int64_t chunk, Tile tile) { normalize_given(o, chunk, tile); });
        if (cut.at_once)
            return each_piece(0, sheet.outer, [&](int64_t o, int64_t chunk, Tile tile) {
                Found<A> found(tile.width);
                A inverse[ROOM];
                gather(o, chunk, tile, found);
                settle(o, tile, found.pivot, found.rest, found.square, inverse);
                normalize(o, chunk, tile, found.pivot, found.rest, inverse);
            });
        for (int64_t begin = 0; begin < sheet.outer; begin += cut.batch) {
            int64_t end = std::min(sheet.outer, begin + cut.batch);
            each_piece(begin, end, [&](int64_t o, int64_t chunk, Tile tile) {
                Found<A> found(tile.width);
                gather(o, chunk, tile, found);
                int64_t at = ((o - begin) * cut.chunks + chunk) * sheet.lanes;
                A *to = partial + 2 * at + tile.first;
                std::copy(found.pivot, found.pivot + tile.width, to);
                std::copy(found.rest, found.rest + tile.width, to + sheet.lanes);
                std::copy(found.square, found.square + tile.width, partial_square + at + tile.first);
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
        }, grain_of(sheet.size / pieces));
    }
    int64_t place(int64_t o, Span span, Tile tile) const { return o * sheet.size + span.first * sheet.lanes + tile.first; }

    void gather(int64_t o, int64_t chunk, Tile tile, Found<A> &found) {
        Span span(sheet, cut, chunk);
        int64_t at = place(o, span, tile), n = 0;
        auto take = [&](int64_t rows, int64_t width) {
            if (call.residual) add_rows(call.x + at, call.residual + at, call.sum + at, sheet.lanes, rows, width);
            if (n == 0 && plan.centred) start(x + at, std::min(rows, DEEP), width, found.pivot);
            alignas(64) A sums[ROOM], squares[ROOM];
            for (int attempt = 1;; ++attempt) {
                std::fill_n(sums, in_vectors(width), A(0));
                std::fill_n(squares, in_vectors(width), A(0));
                accumulate(x + at, rows, width, found.pivot, sums, squares);
                if (attempt == 2 || n > 0 || !plan.centred || !far_off(sums, squares, rows, width)) break;
                for (int64_t l = 0; l < width; ++l) found.pivot[l] += sums[l] / A(rows);
            }
            const Vec<A> least = splat<A>(A(range.least)), most = splat<A>(A(range.most));
            if (any_lane(sums, squares, width, [&](Vec<A>, Vec<A> square) { return (square < least) | (square > most); })) {
                double wide_sums[ROOM] = {}, wide_squares[ROOM] = {};
                accumulate_wide(x + at, sheet.lanes, rows, width, found.pivot, wide_sums, wide_squares);
                found.merge(plan.centred, wide_sums, wide_squares, n, rows, width);
            } else {
                // Whole vectors: beyond the width are zeros; but for the short row, beyond which are lanes.
                found.merge(plan.centred, sums, squares, n, rows, width == tile.width ? in_vectors(width) : width);
            }
            n += rows, at += rows * sheet.lanes;
        };
        for (int64_t row = 0; row < span.rows; row += BLOCK) take(std::min(BLOCK, span.rows - row), tile.width);
        if (span.last) take(1, span.last);
    }

    // The first pivot: the mean of a few rows. About the first row alone, an outlier there would cost as many digits as its square has.
    // Differences from that row make it exact where all elements are equal.
    void start(const T *from, int64_t rows, int64_t width, A *pivot) const {
        const A each = 1 / A(rows);
        for_vectors(width, [&](auto at) {
            Vec<A> first = at.load(from), sum{};
            for (int64_t row = 1; row < rows; ++row) sum += at.load(from + row * sheet.lanes) - first;
            at.store(pivot, first + sum * each);
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
    void settle(int64_t o, Tile tile, A *pivot, A *rest, double *square, A *inverse) {
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

    void merge_chunks(int64_t begin, int64_t end) {
        for_each((end - begin) * cut.tiles, [&](int64_t task) {
            Tile tile = cut.tile(sheet, task % cut.tiles);
            double mean[WIDEST] = {}, *square = whole_square + task / cut.tiles * sheet.lanes + tile.first;
            std::fill_n(square, tile.width, 0.0);
            auto each_chunk = [&](auto &&take) {
                for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
                    Span span(sheet, cut, chunk);
                    int64_t at = (task / cut.tiles * cut.chunks + chunk) * sheet.lanes;
                    const A *p = partial + 2 * at + tile.first;
                    const double *s = partial_square + at + tile.first;
                    for (int64_t l = 0; l < tile.width; ++l)
                        take(l, double(span.rows + (tile.first + l < span.last)), double(p[l]) + double(p[l + sheet.lanes]), s[l]);
                }
            };
            each_chunk([&](int64_t l, double n, double m, double) { mean[l] += n * m; });
            for (int64_t l = 0; l < tile.width; ++l) mean[l] /= double(sheet.elements(tile.first + l));
            each_chunk([&](int64_t l, double n, double m, double s) { square[l] += s + n * (m - mean[l]) * (m - mean[l]); });
            A *to = whole + task / cut.tiles * 3 * sheet.lanes + tile.first;
            for (int64_t l = 0; l < tile.width; ++l) {
                to[l] = A(mean[l]);
                to[l + sheet.lanes] = A(mean[l] - double(to[l]));
            }
        });
        for_each(end - begin, [&](int64_t i) {
            A *moments = whole + i * 3 * sheet.lanes;
            settle(begin + i, {0, sheet.lanes}, moments, moments + sheet.lanes, whole_square + i * sheet.lanes, moments + 2 * sheet.lanes);
        });
    }

    void normalize_given(int64_t o, int64_t chunk, Tile tile) {
        A pivot[WIDEST], rest[WIDEST] = {}, inverse[WIDEST];
        sheet.each_statistic(tile, [&](int64_t l, int64_t k) {
            pivot[l] = plan.centred && call.center ? call.center[o * plan.kept + k] : A(0);
            inverse[l] = call.inverse[o * plan.kept + k];
        });
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
        with_constants(parameters.variation, plan.activation, [&](auto variation, auto kind) {
            constexpr int VARIATION = decltype(variation)::value, KIND = decltype(kind)::value, MANY = KIND == CURVED ? 1 : 2;
            auto some = [&](auto count, int64_t row, int64_t width) {
                constexpr int ROWS = decltype(count)::value;
                int64_t at = place + row * sheet.lanes;
                nk::write<VARIATION, KIND, ROWS>(x + at, call.y + at, sheet.lanes, width, line, row, plan.activation);
            };
            int64_t row = 0;
            for (; row + MANY <= span.rows; row += MANY) some(std::integral_constant<int, MANY>{}, row, tile.width);
            for (; row < span.rows; ++row) some(std::integral_constant<int, 1>{}, row, tile.width);
            if (span.last) some(std::integral_constant<int, 1>{}, row, span.last);
        });
    }
};

}  // namespace

template <class T> void lanes_forward(const NkPlan &plan, const Forward<T> &call) { Pass<T>(plan, call).run(); }

#define MAKE(T) template void lanes_forward<T>(const NkPlan &, const Forward<T> &);
NK_EACH_TYPE(MAKE)

}  // namespace nk
