// NK_NORMALIZE over sets that lie in pieces, far apart: columns, the rows of transposed convolutions, and sets too long for one thread.
// Partial sums of chunks are merged in order, then the weight is written in a second traversal.
//
// Where a piece is short, elements that lie next to one another are lanes with sums of their own, which are folded to sets when they are
// merged; where it is long, it is summed as it is.
#include <algorithm>

#include "weights.h"

namespace nk {

namespace {

constexpr int64_t SHORT = 64;
constexpr int64_t TILE = 2048;  // lanes whose sums stay in the cache
constexpr int64_t BAND = 8;     // rows that a sum takes while it is in a register
constexpr int64_t CHUNKS = 64;

enum Step { SUM, CENTER, SQUARE, MEASURE, WRITE };

template <class T> class ApartJob final : public Job {
    using A = accumulator<T>;

    const NkWeightPlan plan;
    const NkWeightCall call;
    const bool backward, lanes, centred;
    const int64_t width;                          // slots of a set: one for each of its lanes, or one
    const int64_t row, sets;                      // elements of a row, which has all sets of a group
    const int64_t tile, tiles, rows, chunks;      // of lanes
    const int64_t piece, pieces, units, bundle;  // of long pieces: a unit is one piece, a task a bundle of them
    const NkPlan statistic;
    const int sums;
    // What a slot needs to be written: y = (x - center - shift) * factor, dx = (g - mean) * factor - (x - center - shift) * back.
    std::unique_ptr<A[]> center, shift, factor, mean, back;
    std::unique_ptr<A[]> partial;         // groups x chunks x sums x row
    std::unique_ptr<double[]> of_pieces;  // units x sums

public:
    ApartJob(const NkWeightPlan &p, const NkWeightCall &call, bool backward)
        : plan(p), call(call), backward(backward), lanes(p.inner < SHORT), centred(p.centred), width(lanes ? p.inner : 1),
          row(p.kept * p.inner), sets(p.groups * p.kept), tile(std::min(row, TILE)), tiles(ceil_div(row, at_least_one(tile))),
          rows(std::max(at_least_one(GRAIN / at_least_one(tile)), ceil_div(p.far, CHUNKS))), chunks(ceil_div(p.far, rows)),
          piece(std::min(p.inner, GRAIN)), pieces(ceil_div(p.inner, at_least_one(piece))), units(p.groups * p.far * p.kept * pieces),
          bundle(at_least_one(GRAIN / at_least_one(piece))), statistic(statistic_of(p, p.far * p.inner)),
          sums(backward ? (centred ? 4 : 2) : (centred ? 2 : 1)) {
        int64_t slots = sets * width;
        factor = zeros<A>(slots);
        if (centred) center = zeros<A>(slots), shift = zeros<A>(slots);
        if (backward) back = zeros<A>(slots);
        if (backward && centred) mean = zeros<A>(slots);
        if (lanes) partial = zeros<A>(p.groups * chunks * sums * row);
        else of_pieces = zeros<double>(units * sums);
    }

    int64_t tasks(int phase) const override {
        switch (step(phase)) {
            case SUM:
            case SQUARE:
            case WRITE: return lanes ? plan.groups * chunks * tiles : ceil_div(units, bundle);
            case CENTER:
            case MEASURE: return ceil_div(sets, sets_a_task());
        }
        return 0;
    }

    void run(int phase, int64_t task) override {
        Step now = step(phase);
        if (now == CENTER || now == MEASURE) {
            int64_t begin = task * sets_a_task(), end = std::min(begin + sets_a_task(), sets);
            for (int64_t set = begin; set < end; ++set) merge(now, set);
        } else if (now == WRITE) {
            write(task);
        } else if (now == SUM) {
            sum<1>(task, [](auto at, const T *x, const T *, auto, auto *s) { s[0] += at(x); });
        } else if (!backward) {
            if (centred) {
                sum<2>(task, [](auto at, const T *x, const T *, auto center, auto *s) {
                    auto v = at.template only<A>(at(x) - center);
                    s[0] += v;
                    s[1] += v * v;
                });
            } else {
                sum<1>(task, [](auto at, const T *x, const T *, auto, auto *s) {
                    auto v = at(x);
                    s[0] += v * v;
                });
            }
        } else if (centred) {
            sum<4>(task, [](auto at, const T *x, const T *g, auto center, auto *s) {
                auto v = at.template only<A>(at(x) - center);
                auto d = at(g);
                s[0] += v;
                s[1] += v * v;
                s[2] += d;
                s[3] += v * d;
            });
        } else {
            sum<2>(task, [](auto at, const T *x, const T *g, auto, auto *s) {
                auto v = at(x);
                s[0] += v * v;
                s[1] += v * at(g);
            });
        }
    }

private:
    Step step(int phase) const { return Step(std::min(phase + (centred ? 0 : int(SQUARE)), WRITE + 1)); }
    int64_t sets_a_task() const {
        int64_t values = sums * (lanes ? chunks * plan.inner : plan.far * pieces);
        return at_least_one(GRAIN / at_least_one(values));
    }

    struct Stretch {
        int64_t group, from, to, first, n;  // rows [from, to) and lanes [first, first + n) of a group
    };
    Stretch stretch(int64_t task) const {
        int64_t t = task % tiles, c = task / tiles % chunks;
        return {task / tiles / chunks, c * rows, std::min((c + 1) * rows, plan.far), t * tile, std::min(tile, row - t * tile)};
    }

    // each(begin, n, set, unit): the pieces of a task.
    template <class Each> void bundled(int64_t task, Each &&each) const {
        for (int64_t unit = task * bundle; unit < std::min((task + 1) * bundle, units); ++unit) {
            int64_t p = unit % pieces, place = unit / pieces, k = place % plan.kept, group = place / plan.kept / plan.far;
            each(place * plan.inner + p * piece, std::min(piece, plan.inner - p * piece), group * plan.kept + k, unit);
        }
    }

    template <int K, class Terms> void sum(int64_t task, Terms &&terms) {
        auto x = static_cast<const T *>(call.weight), g = static_cast<const T *>(call.gradient);
        if (!lanes) {
            bundled(task, [&](int64_t begin, int64_t n, int64_t set, int64_t unit) {
                double totals[K] = {};
                A about = center ? center[set] : A(0);
                auto px = x + begin, pg = g ? g + begin : g;
                sum_over<A>(n, totals, [=](auto at, auto *s) { terms(at, px, pg, about, s); });
                std::copy_n(totals, K, &of_pieces[unit * sums]);
            });
            return;
        }
        Stretch s = stretch(task);
        A *into = &partial[(s.group * chunks + s.from / rows) * sums * row];
        const A *about = center ? &center[s.group * row] : nullptr;
        int64_t start = s.group * plan.far * row;
        for (int k = 0; k < K; ++k) std::fill_n(into + k * row + s.first, s.n, A(0));
        for (int64_t from = s.from; from < s.to; from += BAND) {
            int64_t to = std::min(from + BAND, s.to);
            over(s.n, [&](auto at) {
                Vec<A> total[K], middle{};
                for (int k = 0; k < K; ++k) total[k] = at(into + k * row + s.first);
                if (about) middle = at(about + s.first);
                for (int64_t r = from; r < to; ++r) {
                    int64_t place = start + r * row + s.first;
                    terms(at, x + place, g ? g + place : g, middle, total);
                }
                for (int k = 0; k < K; ++k) at.put(into + k * row + s.first, total[k]);
            });
        }
    }

    void merge(Step now, int64_t set) {
        double totals[4] = {};
        int64_t group = set / plan.kept, k = set % plan.kept;
        int many = now == CENTER ? 1 : sums;
        if (lanes) {
            for (int64_t c = 0; c < chunks; ++c)
                for (int s = 0; s < many; ++s) {
                    const A *from = &partial[((group * chunks + c) * sums + s) * row + k * plan.inner];
                    for (int64_t i = 0; i < plan.inner; ++i) totals[s] += double(from[i]);
                }
        } else {
            for (int64_t f = 0; f < plan.far; ++f)
                for (int64_t p = 0; p < pieces; ++p)
                    for (int s = 0; s < many; ++s)
                        totals[s] += of_pieces[(((group * plan.far + f) * plan.kept + k) * pieces + p) * sums + s];
        }
        double n = double(plan.far * plan.inner);
        if (now == CENTER) fill(center, set, totals[0] / n);
        else measure(set, totals, n);
    }

    void fill(std::unique_ptr<A[]> &values, int64_t set, double value) { std::fill_n(&values[set * width], width, A(value)); }

    void measure(int64_t set, const double *totals, double n) {
        double left = centred ? totals[0] / n : 0, square = centred ? positive(totals[1] - n * left * left) : totals[0];
        double inverse = inverse_scale<double>(statistic, square);
        double gain = plan.factor * (call.gain ? double(widen(static_cast<const T *>(call.gain)[set])) : 1.0);
        double size = gain * inverse;
        fill(factor, set, size);
        if (centred) fill(shift, set, left);
        if (!backward) return;
        double along = (centred ? totals[3] - left * totals[2] : totals[1]) * inverse;
        if (centred) fill(mean, set, totals[2] / n);
        fill(back, set, plan.constant ? 0 : size * inverse * strength<double>(statistic, inverse) * along);
        if (call.dgain) static_cast<T *>(call.dgain)[set] = narrow<T>(A(plan.factor * along));
    }

    // What a vector of lanes, or a piece of one set, needs: of(values) reads an array of slots.
    template <class At, class Of> void write_one(At at, const T *x, const T *g, T *y, Of &&of) const {
        if (!backward) at.put(y, centred ? (at(x) - of(center) - of(shift)) * of(factor) : at(x) * of(factor));
        else if (!centred) at.put(y, at(g) * of(factor) - at(x) * of(back));
        else at.put(y, (at(g) - of(mean)) * of(factor) - (at(x) - of(center) - of(shift)) * of(back));
    }

    void write(int64_t task) {
        auto x = static_cast<const T *>(call.weight), g = static_cast<const T *>(call.gradient);
        auto y = static_cast<T *>(call.result);
        if (!lanes) {
            bundled(task, [&](int64_t begin, int64_t n, int64_t set, int64_t) {
                over(n, [&](auto at) {
                    write_one(at, x + begin, g ? g + begin : g, y + begin, [&](const auto &values) { return splat<A>(values[set]); });
                });
            });
            return;
        }
        Stretch s = stretch(task);
        int64_t slot = s.group * row + s.first;
        for (int64_t r = s.from; r < s.to; ++r) {
            int64_t place = (s.group * plan.far + r) * row + s.first;
            over(s.n, [&](auto at) {
                write_one(at, x + place, g ? g + place : g, y + place, [&](const auto &values) { return at(&values[slot]); });
            });
        }
    }
};

}  // namespace

template <class T> NewJob apart_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    return NewJob(new ApartJob<T>(plan, call, backward));
}

#define MAKE(T) template NewJob apart_job<T>(const NkWeightPlan &, const NkWeightCall &, bool);
NK_EACH_TYPE(MAKE)

}  // namespace nk
