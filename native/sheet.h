// A tensor as sheets of rows and lanes: what lanes_forward and lanes_backward share.
//
// For each outer there is a sheet: rows of lanes next to one another, each lane of one statistic, all of far x (kept * mid * inner). Few lanes
// fill no vector: then several rows of the tensor make one of the sheet ("fold"), of which the last may be short.
//
// A sheet is cut into tiles of lanes that fit local arrays. Where all rows of a tile fit the cache, one task does a tile in one traversal of
// memory. Otherwise rows are cut into chunks too, whose partial results are merged, in order, before the second traversal.
#pragma once
#include <algorithm>
#include <numeric>

#include "activation.h"
#include "row.h"
#include "statistic.h"
#include "threads.h"

namespace nk {

constexpr int64_t WIDEST = 1024;          // lanes of a tile
constexpr int64_t ROOM = WIDEST + LANES;  // of local arrays, which are read in whole vectors
constexpr int64_t PIECE = 2048;           // bytes of a row that are worth reading apart from the rest of it

struct Tile {
    int64_t first, width;  // lanes
};

struct Sheet {
    int64_t outer, far, size;  // size: elements of a sheet
    int64_t period, group;     // lanes of the tensor; lanes next to one another that share a statistic
    int64_t inner;
    int64_t fold, lanes, rows;  // rows are whole
    int64_t last;               // lanes of the short row behind them, or 0
    bool bound;                 // gain or bias vary along far

    explicit Sheet(const NkPlan &plan)
        : outer(plan.outer), far(plan.far), group(plan.mid * plan.inner), inner(plan.inner), bound(plan.per_far != 0 && plan.far > 1) {
        period = plan.kept * group;
        size = far * period;
        fold = folded();
        lanes = fold * period;
        rows = far / fold;
        last = far % fold * period;
    }

    bool plain() const { return group == 1 && fold == 1; }  // every lane is a statistic of its own
    int64_t elements(int64_t lane) const { return rows + (lane < last); }

    // use(l, statistic) for the lanes of a tile, from its first. Without a division for each, which would take longer than what is done.
    template <class Use> void each_statistic(Tile tile, Use &&use) const {
        if (plain()) {
            for (int64_t l = 0; l < tile.width; ++l) use(l, tile.first + l);
            return;
        }
        int64_t at = tile.first % period, k = at / group, inside = at % group;
        for (int64_t l = 0; l < tile.width; ++l) {
            use(l, k);
            if (++inside == group) inside = 0, k = (k + 1) * group == period ? 0 : k + 1;
        }
    }

    // each_set(each_lane), where each_lane(f) calls f(lane) for the tile's lanes, from its first, that share a statistic.
    template <class EachSet> void for_sets(Tile tile, EachSet &&each_set) const {
        for (int64_t start = 0; start < std::min(tile.width, period); start += group)
            each_set([&](auto &&f) {
                for (int64_t again = start; again < tile.width; again += period)
                    for (int64_t lane = again; lane < again + group; ++lane) f(lane);
            });
    }

private:
    int64_t folded() const {
        // Where parameters vary along far too, a fold needs them as a table of the sheet's size.
        if ((bound && period >= LANES) || period > 128 || (period >= 64 && period % LANES == 0)) return 1;
        int64_t even = LANES / std::gcd<int64_t>(LANES, period);
        int64_t many = even * period <= WIDEST ? even * std::max<int64_t>(1, 256 / (even * period)) : WIDEST / period;
        // Lanes that lie apart are merged at the end, which costs as much as some rows.
        return std::max<int64_t>(1, std::min(many, period < LANES ? far : far / 16));
    }
};

// Where sheets are cut. It depends on the plan alone, so that results do not depend on the threads.
struct Cut {
    bool at_once;            // one task has all rows of its lanes
    int64_t width, tiles;    // lanes of a tile
    int64_t height, chunks;  // rows of a chunk
    int64_t batch;           // sheets whose two traversals follow each other, so that the second finds much in the cache
    bool alone;              // a sheet of them is one task, and its second traversal finds all of it there

    Cut(const Sheet &sheet, int64_t bytes) {  // bytes that are read for each element
        constexpr int64_t own = 256 << 10, shared = 4 << 20;
        int64_t fits = std::min(WIDEST, own / (bytes * (sheet.rows + 1)) / 16 * 16);
        bool whole = sheet.group <= fits && (sheet.fold == 1 || sheet.lanes <= fits);
        // Shorter pieces of rows are too many streams for the processor to foresee.
        at_once = whole && fits * bytes >= std::min<int64_t>(PIECE, sheet.lanes * bytes);
        int64_t most = at_once ? fits : WIDEST;
        tiles = (sheet.lanes + most - 1) / most;
        width = (sheet.lanes + tiles - 1) / tiles;
        if (tiles > 1) {
            int64_t step = at_once && sheet.group > 1 ? std::lcm<int64_t>(sheet.group, 16) : 16;  // whole lines of the cache
            if (step > most) step = sheet.group;
            width = std::min((width + step - 1) / step * step, most / step * step);
            tiles = (sheet.lanes + width - 1) / width;
        }
        height = at_once ? sheet.rows : std::max<int64_t>(64, own / (bytes * width) / 64 * 64);
        chunks = at_once ? 1 : (sheet.rows + height - 1) / height;
        alone = !sheet.bound && shared >= 2 * bytes * sheet.size && sheet.outer >= 2 * threads();
        batch = alone ? sheet.outer : std::clamp<int64_t>(shared / (bytes * sheet.size), 1, sheet.outer);
    }

    // Whether rows of an output can be written past the cache: each piece of them has its lines to itself.
    template <class T> bool streams(const NkPlan &plan, const Sheet &sheet, const T *out) const {
        auto whole = [](int64_t lanes) { return lanes * int64_t(sizeof(T)) % LINE == 0; };
        return plan.stream && until_line(out) == 0 && on_element(out) && whole(sheet.lanes) && whole(width) && sheet.last == 0;
    }

    Tile tile(const Sheet &sheet, int64_t index) const { return {index * width, std::min(width, sheet.lanes - index * width)}; }
};

// Rows of a chunk, and the lanes of the short row behind them.
struct Span {
    int64_t first, rows, last;

    Span(const Sheet &sheet, const Cut &cut, int64_t chunk) {
        first = chunk * cut.height;
        rows = std::min(cut.height, sheet.rows - first);
        last = chunk == cut.chunks - 1 ? sheet.last : 0;
    }
};

// each(line, o, chunk, tile) for the pieces of some sheets, in the order of memory. A line holds what is the same in all chunks of a tile;
// there is one for each thread.
template <class Line, bool BACKWARDS = false, class Each>
void for_pieces(const Cut &cut, int64_t begin, int64_t end, int64_t grain, Each &&each) {
    for_ranges((end - begin) * cut.tiles * cut.chunks, [&](int64_t first, int64_t last) {
        Line line;
        for (int64_t i = first; i < last; ++i) {
            int64_t piece = BACKWARDS ? first + last - 1 - i : i, chunk = piece / cut.tiles;
            each(line, begin + chunk / cut.chunks, chunk % cut.chunks, piece % cut.tiles);
        }
        end_of_stream();
    }, grain);
}

// All pieces of some sheets are summed, sums(line, o, chunk, tile), a sheet's sums are finalized, finalize(o), and all pieces are
// written. Backwards: what was read last is still near.
template <class Line, class Sums, class Finalize, class Write>
void in_steps(const Sheet &sheet, const Cut &cut, int64_t begin, int64_t end, Sums &&sums, Finalize &&finalize, Write &&write) {
    if (cut.alone)
        return for_each(end - begin, [&](int64_t i) {
            int64_t o = begin + i, all = cut.tiles * cut.chunks;
            for_pieces<Line>(cut, o, o + 1, all, sums);
            finalize(o);
            for_pieces<Line, true>(cut, o, o + 1, all, write);
        });
    int64_t grain = grain_of(sheet.size / (cut.tiles * cut.chunks));
    for_pieces<Line>(cut, begin, end, grain, sums);
    for_each(end - begin, [&](int64_t i) { finalize(begin + i); });
    for_pieces<Line, true>(cut, begin, end, grain, write);
}

constexpr int CURVED = -1;  // an activation that is applied to a run of numbers at a time

// How gain and bias vary: along rows, they are a number a row; along both, a number for each element.
enum Variation { PER_LANE, PER_ROW, PER_ELEMENT };

// f(VARIATION, KIND) as compile-time constants; KIND is NK_LINEAR, NK_RELU, CURVED or, backward, one of an output.
template <bool BACKWARD = false, class F> void with_constants(Variation variation, int32_t activation, F &&f) {
    auto with_variation = [&](auto kind) {
        if (variation == PER_LANE) f(std::integral_constant<int, PER_LANE>{}, kind);
        else if (variation == PER_ROW) f(std::integral_constant<int, PER_ROW>{}, kind);
        else f(std::integral_constant<int, PER_ELEMENT>{}, kind);
    };
    if constexpr (BACKWARD) {
        if (activation == OUTPUT) return with_variation(std::integral_constant<int, OUTPUT>{});
        if (activation == LEAKY_OUTPUT) return with_variation(std::integral_constant<int, LEAKY_OUTPUT>{});
    }
    if (activation == NK_LINEAR) with_variation(std::integral_constant<int, NK_LINEAR>{});
    else if (activation == NK_RELU) with_variation(std::integral_constant<int, NK_RELU>{});
    else with_variation(std::integral_constant<int, CURVED>{});
}

// Where gain and bias of a sheet's elements are. Where memory has them in another order, they are laid out as a table.
template <class A> class Parameters {
    const NkPlan &plan;
    const Sheet &sheet;
    bool tabled;

public:
    Variation variation;
    int64_t row_step, lane_step;

    Parameters(const NkPlan &plan, const Sheet &sheet) : plan(plan), sheet(sheet) {
        bool along_lanes = (plan.per_kept != 0 && plan.kept > 1) || (plan.per_mid != 0 && plan.mid > 1) || (plan.per_inner != 0 && plan.inner > 1);
        bool alike = (plan.per_inner == 1 || plan.inner == 1) && (plan.per_mid == plan.inner || plan.mid == 1) &&
                     (plan.per_kept == sheet.group || plan.kept == 1);
        tabled = (along_lanes && !alike) || (sheet.fold > 1 && (along_lanes || sheet.bound));
        variation = !sheet.bound ? PER_LANE : along_lanes || sheet.fold > 1 ? PER_ELEMENT : PER_ROW;
        row_step = !sheet.bound ? 0 : tabled ? sheet.lanes : plan.per_far;
        lane_step = along_lanes || tabled;
    }

    int64_t places() const { return plan.outer_step == 0 ? 1 : std::min(plan.outer_mod, (plan.outer - 1) / plan.outer_div + 1); }
    // Elements of a sheet's own table.
    int64_t area() const {
        return (variation == PER_LANE ? 1 : sheet.rows + (sheet.last != 0)) * (variation == PER_ROW ? 1 : sheet.lanes);
    }
    int64_t room() const { return tabled ? places() * area() : 0; }
    int64_t place(int64_t o) const {
        return tabled ? (plan.outer_step == 0 ? 0 : o / plan.outer_div % plan.outer_mod) * area() : outer_place(plan, o);
    }

    // The parameter as this class says where its elements are: itself, or a table of room() elements.
    const A *lay_out(const A *parameter, A *table) const {
        if (parameter == nullptr || !tabled) return parameter;
        std::fill_n(table, room(), A(0));  // behind a sheet's last element too
        for (int64_t place = 0; place < places(); ++place)
            each_index([&](int64_t i, int64_t index) { table[place * area() + i] = parameter[place * plan.outer_step + index]; });
        return table;
    }
    // total[index of the parameter] += found[i], for an area that belongs to the sheet o.
    template <class F> void add_up(const F *found, int64_t o, double *total) const {
        total += outer_place(plan, o);
        if (!tabled && variation == PER_LANE) {
            for (int64_t i = 0; i < sheet.lanes; ++i) total[i * lane_step] += double(found[i]);
            return;
        }
        each_index([&](int64_t i, int64_t index) { total[index] += double(found[i]); });
    }

private:
    // use(i, index) for the elements of an area: index is that of the parameter, from the sheet's place on.
    template <class Use> void each_index(Use &&use) const {
        if (variation == PER_ROW) {
            for (int64_t i = 0; i < area(); ++i) use(i, i * plan.per_far);
            return;
        }
        int64_t rows = area() / sheet.lanes, far = std::min(sheet.far, rows * sheet.fold), i = 0;
        for (int64_t f = 0; f < far; ++f)
            for (int64_t k = 0; k < plan.kept; ++k)
                for (int64_t m = 0; m < plan.mid; ++m)
                    for (int64_t in = 0; in < plan.inner; ++in)
                        use(i++, f * plan.per_far + k * plan.per_kept + m * plan.per_mid + in * plan.per_inner);
    }
};

}  // namespace nk
