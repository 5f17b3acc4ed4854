// The gradient of normalizing by statistics per lane, and of gain and bias.
//
// With g the gradient behind gain and bias, and d = x - center, lanes are summed over g and g * d (times the gain, where it varies along
// rows). From these come the gradients of the parameters, and what the statistic's own derivative takes from dx.
#include <utility>

#include "kernels.h"
#include "lanes_backward_rows.h"
#include "room.h"

namespace nk {
namespace {

constexpr int64_t BLOCK = 64;  // rows that are summed before they are added up in double precision

template <class T> class LanesBackward {
    using A = accumulator<T>;

    const NkPlan &plan;
    const Backward<T> &call;
    Sheet sheet;
    Cut cut;
    Parameters<A> parameters;
    bool measured, wanted;  // the statistic depends on x; a parameter's gradient is asked for
    bool far;             // dx is written past the cache
    int64_t shares;       // at once: of the sheets, each share by one task a tile; otherwise sheets of a batch
    int64_t parts;        // of a share's gradients of the parameters
    Room<A, 2048> room;
    Room<double, 1024> sums_room;
    const A *weight, *bias;
    A *partial, *corrections;  // sums over lanes, of each chunk of a batch; what they make of dx
    double *lane_sums;   // of the sheets of a batch: of g, of g * d
    double *gradient;    // of the parameters, of each share, by area: sums of g * normalized, of g
    double *totals;      // of all shares

public:
    LanesBackward(const NkPlan &plan, const Backward<T> &call)
        : plan(plan), call(call), sheet(plan), cut(sheet, 2 * sizeof(T)), parameters(plan, sheet),
          far(call.dx && call.dx != call.x && call.dx != call.dy && cut.streams(plan, sheet, call.dx)) {
        wanted = call.dweight || call.dbias;
        measured = !plan.given && (plan.centred || plan.scale != NK_UNSCALED);
        shares = cut.batch;
        if (cut.at_once) shares = parameters.places() > 1 ? sheet.outer : std::clamp<int64_t>(128 / cut.tiles, 1, sheet.outer);
        parts = parameters.variation == PER_ROW ? cut.tiles : 1;
        int64_t lanes = cut.at_once ? 0 : cut.batch * 2 * sheet.lanes, table = parameters.room();
        int64_t gradient_size = wanted ? shares * parts * 2 * parameters.area() : 0;
        A *scratch = room.take(2 * table + lanes * (cut.chunks + 1));
        partial = scratch + 2 * table;
        corrections = partial + lanes * cut.chunks;
        lane_sums = sums_room.take(lanes + gradient_size + 2 * plan.parameters);
        gradient = lane_sums + lanes;
        totals = gradient + gradient_size;
        weight = parameters.lay_out(call.weight, scratch);
        bias = parameters.lay_out(call.bias, scratch + table);
        if (!weight && !bias && !wanted) parameters.variation = PER_LANE;
    }

    void run() {
        if (wanted) std::fill(totals, totals + 2 * plan.parameters, 0.0);
        if (cut.at_once) {
            for_each(shares * cut.tiles, [&](int64_t task) {
                int64_t share = task / cut.tiles, first = share * sheet.outer / shares, last = (share + 1) * sheet.outer / shares;
                for (int64_t o = first; o < last; ++o) sheet_at_once(o, task % cut.tiles, share, o == first);
            }, grain_of(sheet.outer * sheet.size / (shares * cut.tiles)));
            for (int64_t share = 0; share < shares; ++share) add_gradients(share, share * sheet.outer / shares);
        } else {
            for (int64_t begin = 0; begin < sheet.outer; begin += cut.batch) in_chunks(begin, std::min(sheet.outer, begin + cut.batch));
        }
        if (call.dweight) std::copy_n(totals, plan.parameters, call.dweight);
        if (call.dbias) std::copy_n(totals + plan.parameters, plan.parameters, call.dbias);
    }

private:
    int64_t place(int64_t o, Span span, Tile tile) const { return o * sheet.size + span.first * sheet.lanes + tile.first; }
    bool by_lane() const { return parameters.variation == PER_LANE; }
    // A share's sums for the parameters: of g * normalized; those of g follow after an area.
    double *gradient_of(int64_t share, int64_t tile) const {
        return wanted ? gradient + (share * parts + (parts > 1 ? tile : 0)) * 2 * parameters.area() : nullptr;
    }

    void sheet_at_once(int64_t o, int64_t index, int64_t share, bool fresh) {
        Tile tile = cut.tile(sheet, index);
        Span span(sheet, cut, 0);
        BackwardLine<A> line;
        set_line(line, o, span, tile);
        double sums[ROOM], products[ROOM];
        std::fill_n(sums, tile.width, 0.0);
        std::fill_n(products, tile.width, 0.0);
        if (measured || wanted) reduce_rows(o, span, tile, line, sums, products, gradient_of(share, index), fresh);
        if (wanted && by_lane()) {
            double *to = gradient_of(share, index) + tile.first;
            for (int64_t l = 0; l < tile.width; ++l) {
                to[l] = (fresh ? 0 : to[l]) + products[l] * double(line.inverse[l]);
                to[l + sheet.lanes] = (fresh ? 0 : to[l + sheet.lanes]) + sums[l];
            }
        }
        if (!call.dx) return;
        if (measured) finalize(o, tile, sums, products, line.d_gain, line.d_shift);
        write_rows(o, span, tile, line);
    }

    void in_chunks(int64_t begin, int64_t end) {
        int64_t lanes = sheet.lanes;
        bool early = call.dx && !measured;  // dx does not wait for the sums: it is written while what it takes is near
        in_steps<BackwardLine<A>>(
            sheet, cut, begin, end,
            [&](auto &line, int64_t o, int64_t chunk, int64_t index) {
                Tile tile = cut.tile(sheet, index);
                Span span(sheet, cut, chunk);
                set_line(line, o, span, tile);
                if (measured || wanted) {
                    double sums[ROOM] = {}, products[ROOM] = {};
                    reduce_rows(o, span, tile, line, sums, products, gradient_of(o - begin, index), true);
                    A *to = partial + ((o - begin) * cut.chunks + chunk) * 2 * lanes + tile.first;
                    std::copy(sums, sums + tile.width, to);
                    std::copy(products, products + tile.width, to + lanes);
                }
                if (early) write_rows(o, span, tile, line);
            },
            [&](int64_t o) {
                int64_t b = o - begin;
                double *sums = lane_sums + b * 2 * lanes, *products = sums + lanes;
                if (measured || wanted) merge_chunks(o, partial + b * cut.chunks * 2 * lanes, sums, gradient_of(b, 0));
                if (measured) finalize(o, {0, lanes}, sums, products, corrections + b * 2 * lanes, corrections + (b * 2 + 1) * lanes);
            },
            [&](auto &line, int64_t o, int64_t chunk, int64_t index) {
                if (early || !call.dx) return;
                Tile tile = cut.tile(sheet, index);
                Span span(sheet, cut, chunk);
                if (set_line(line, o, span, tile)) {
                    const A *correction = corrections + (o - begin) * 2 * lanes + tile.first;
                    std::copy(correction, correction + tile.width, line.d_gain);
                    std::copy(correction + lanes, correction + lanes + tile.width, line.d_shift);
                }
                write_rows(o, span, tile, line);
            });
        for (int64_t b = 0; b < end - begin; ++b) add_gradients(b, begin + b);
    }

    void merge_chunks(int64_t o, const A *chunks, double *sums, double *gradient) {
        int64_t lanes = sheet.lanes;
        std::fill(sums, sums + 2 * lanes, 0.0);
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk, chunks += 2 * lanes)
            for (int64_t i = 0; i < 2 * lanes; ++i) sums[i] += double(chunks[i]);
        if (!wanted || !by_lane()) return;
        sheet.each_statistic({0, lanes}, [&](int64_t l, int64_t k) { gradient[l] = sums[lanes + l] * double(call.inverse[o * plan.kept + k]); });
        std::copy(sums, sums + lanes, gradient + lanes);
    }

    // Makes the line that of a tile, and says whether it was another's.
    bool set_line(BackwardLine<A> &line, int64_t o, Span span, Tile tile) const {
        int64_t parameter = parameters.place(o) + span.first * parameters.row_step + tile.first * parameters.lane_step;
        line.weight = weight ? weight + parameter : nullptr;
        line.bias = bias ? bias + parameter : nullptr;
        line.weight_step = line.bias_step = parameters.row_step;
        line.kind = plan.activation;
        bool other = line.sheet != o || line.tile != tile.first;
        line.sheet = o, line.tile = tile.first;
        // But for PER_LANE, gain and shift are free to stand for a missing parameter.
        if (!by_lane() && !weight) line.weight = line.gain, line.weight_step = 0;
        if (!by_lane() && !bias) line.bias = line.shift, line.bias_step = 0;
        if (!other) return false;
        const A *centers = plan.centred && call.center ? call.center + o * plan.kept : nullptr, *inverses = call.inverse + o * plan.kept;
        sheet.each_statistic(tile, [&](int64_t l, int64_t k) {
            line.center[l] = centers ? centers[k] : A(0);
            line.inverse[l] = inverses[k];
        });
        for (int64_t l = 0; l < tile.width; ++l) {
            line.gain[l] = by_lane() && weight ? line.inverse[l] * line.weight[l * parameters.lane_step] : line.inverse[l];
            line.shift[l] = by_lane() && bias ? line.bias[l * parameters.lane_step] : A(0);
        }
        for (int64_t l = 0; call.kind <= OUTPUT && l < tile.width; ++l) line.center[l] = 1 / (by_lane() ? line.gain[l] : line.inverse[l]);
        if (!by_lane() && !weight) std::fill(line.gain, line.gain + ROOM, A(1));
        if (!by_lane() && !bias) std::fill(line.shift, line.shift + ROOM, A(0));
        return true;
    }

    // Sums over the span's rows, for each lane; and gradients of parameters that vary along rows, from the span's first row and the tile's first lane on.
    void reduce_rows(int64_t o, Span span, Tile tile, const BackwardLine<A> &line, double *sums, double *products, double *gradient, bool fresh) const {
        if (wanted) gradient += parameters.variation == PER_ROW ? span.first : parameters.variation == PER_ELEMENT ? span.first * sheet.lanes + tile.first : 0;
        const bool along_rows = wanted && !by_lane();
        with_constants<true>(parameters.variation, call.kind, [&](auto variation, auto kind) {
            alignas(64) A some_sums[ROOM], some_products[ROOM], dbeta[ROOM], dgamma[ROOM];
            int64_t at = place(o, span, tile), rows = span.rows + (span.last != 0);
            for (int64_t row = 0; row < rows;) {
                std::fill_n(some_sums, in_vectors(tile.width), A(0));
                std::fill_n(some_products, in_vectors(tile.width), A(0));
                for (int64_t end = std::min(row + BLOCK, rows); row < end; ++row, at += sheet.lanes) {
                    int64_t width = row < span.rows ? tile.width : span.last;
                    reduce_row(Row<variation, kind, T>(call.dy + at, call.x + at, width, row, line), some_sums, some_products, dbeta, dgamma);
                    double *to = along(gradient, variation == PER_ROW ? row : row * sheet.lanes);
                    for (int64_t i = 0; along_rows && i < (variation == PER_ROW ? 1 : width); ++i) {
                        to[i] = (fresh ? 0 : to[i]) + double(dgamma[i]);
                        to[i + parameters.area()] = (fresh ? 0 : to[i + parameters.area()]) + double(dbeta[i]);
                    }
                }
                for (int64_t l = 0; l < tile.width; ++l) sums[l] += double(some_sums[l]), products[l] += double(some_products[l]);
            }
        });
    }

    // From sums over lanes, of which only the lanes' gains are missing, to what the statistics' derivative adds to dx: d * d_gain + d_shift.
    void finalize(int64_t o, Tile tile, double *sums, double *products, A *d_gain, A *d_shift) const {
        if (by_lane() && weight) {
            const A *gain = weight + parameters.place(o) + tile.first * parameters.lane_step;
            for (int64_t l = 0; l < tile.width; ++l) sums[l] *= double(gain[l * parameters.lane_step]), products[l] *= double(gain[l * parameters.lane_step]);
        }
        if (!sheet.plain())
            sheet.for_sets(tile, [&](auto &&each_lane) {
                double sum = 0, product = 0;
                each_lane([&](int64_t l) { sum += sums[l], product += products[l]; });
                each_lane([&](int64_t l) { sums[l] = sum, products[l] = product; });
            });
        const A *inverse = call.inverse + o * plan.kept;
        double size = plan.centred ? double(set_size(plan)) : INFINITY;
        sheet.each_statistic(tile, [&](int64_t l, int64_t k) {
            A scale = inverse[k];
            double i = double(scale);
            d_gain[l] = A(-(i * double(strength(plan, scale))) * (i * i) * products[l]);
            d_shift[l] = plan.centred ? A(-i * sums[l] / size) : A(0);
        });
    }

    void write_rows(int64_t o, Span span, Tile tile, const BackwardLine<A> &line) const {
        with_constants<true>(parameters.variation, call.kind, [&](auto variation, auto kind) {
            int64_t at = place(o, span, tile);
            for (int64_t row = 0; row < span.rows + (span.last != 0); ++row, at += sheet.lanes) {
                Row<variation, kind, T> of(call.dy + at, call.x + at, row < span.rows ? tile.width : span.last, row, line);
                const T *dsum = along(call.dsum, at);
                measured ? write_dx<true>(of, dsum, call.dx + at, far) : write_dx<false>(of, dsum, call.dx + at, far);
            }
        });
    }

    void add_gradients(int64_t share, int64_t o) {
        if (!wanted) return;
        for (int64_t part = 0; part < parts; ++part) {
            parameters.add_up(gradient_of(share, part), o, totals);
            parameters.add_up(gradient_of(share, part) + parameters.area(), o, totals + plan.parameters);
        }
    }
};

}  // namespace

template <class T> void lanes_backward(const NkPlan &plan, const Backward<T> &call) { LanesBackward<T>(plan, call).run(); }

#define MAKE(T) template void lanes_backward<T>(const NkPlan &, const Backward<T> &);
NK_EACH_TYPE(MAKE)

}  // namespace nk
