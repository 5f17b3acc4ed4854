// Rows and columns of a weight brought to alike norms: y = factor * L x R, with L one number a near set and R one number an apart set.
//
// Steps sweep over the weight or merge what a sweep found; a sweep takes bands of rows, measures each row and then, while the band is in
// the cache, adds to the sums of the lanes. R is kept once a lane, so that all inner loops run along lanes.
#include <algorithm>
#include <limits>
#include <vector>

#include "weights.h"

namespace nk {

namespace {

enum Kind {
    MEASURE,         // norms of rows and lanes
    MERGE,           // chunks to factors
    WRITE,           // y
    SLOPE,           // what reaches the factors of rows and lanes
    MERGE_SLOPE,
    WRITE_GRADIENT,  // dx; of an iteration of Ruiz, the gradient of what it started from
};
struct Step {
    Kind kind;
    int iteration;
};

// The factors of one system after an iteration: the product of all so far, the last one, and whether it depends on the weight (1) or its
// floor holds (0).
template <class A> struct Factors {
    std::vector<A> product, last, free;
    explicit Factors(int64_t n) : product(std::size_t(n), A(1)), last(std::size_t(n), A(1)), free(std::size_t(n), A(1)) {}
};

template <class T> class BothJob final : public Job, Bands {
    using A = accumulator<T>;

    const NkWeightPlan plan;
    const NkWeightCall call;
    const bool backward, ruiz, rows_first, lanes_first;
    const int64_t all_rows, all_lanes;
    const A factor;
    const T *const x, *const g;
    std::vector<Step> steps;
    std::vector<Factors<A>> left, right;  // one of each an iteration, and of Ruiz one before
    std::vector<A> left_slope, right_slope;
    std::vector<A> partial;  // groups x chunks x n
    std::vector<A> working;  // the gradient on its way back through iterations, where the weight's type is too narrow for it

public:
    BothJob(const NkWeightPlan &p, const NkWeightCall &call, bool backward)
        : Bands(p, 64, sizeof(T)), plan(p), call(call), backward(backward), ruiz(p.method == NK_RUIZ),
          rows_first(p.method == NK_SEQUENTIAL && p.sets == NK_NEAR), lanes_first(p.method == NK_SEQUENTIAL && p.sets == NK_APART),
          all_rows(p.groups * p.far), all_lanes(p.groups * n),
          factor(A(p.factor)), x(static_cast<const T *>(call.weight)), g(static_cast<const T *>(call.gradient)),
          left_slope(std::size_t(backward ? all_rows : 0)), right_slope(std::size_t(backward ? all_lanes : 0)),
          partial(std::size_t(p.groups * chunks * n)) {
        int iterations = ruiz ? p.iterations : 1;
        left.assign(std::size_t(backward && ruiz ? iterations + 1 : 1), Factors<A>(all_rows));
        right.assign(left.size(), Factors<A>(all_lanes));
        for (int k = 0; k < iterations; ++k) steps.insert(steps.end(), {{MEASURE, k}, {MERGE, k}});
        if (!backward || plan.constant) {
            steps.push_back({backward ? WRITE_GRADIENT : WRITE, 0});
        } else {
            if (ruiz && sizeof(T) < sizeof(A)) working.resize(std::size_t(size_of(p)));
            for (int k = iterations - 1; k >= 0; --k) steps.insert(steps.end(), {{SLOPE, k}, {MERGE_SLOPE, k}, {WRITE_GRADIENT, k}});
        }
    }

    int64_t tasks(int phase) const override {
        if (std::size_t(phase) >= steps.size()) return 0;
        Kind kind = steps[std::size_t(phase)].kind;
        return kind == MERGE || kind == MERGE_SLOPE ? plan.groups : plan.groups * chunks;
    }

    void run(int phase, int64_t task) override {
        auto [kind, k] = steps[std::size_t(phase)];
        switch (kind) {
            case MEASURE: return ruiz ? measure_ruiz(k, task) : measure(task);
            case MERGE: return merge(k, task);
            case WRITE: return write(task, x);
            case SLOPE: return ruiz ? slope_ruiz(k, task) : slope(task);
            case MERGE_SLOPE: return merge_slope(k, task);
            case WRITE_GRADIENT: return plan.constant ? write(task, g) : ruiz ? write_slope_ruiz(k, task) : write_slope(task);
        }
    }

private:
    Factors<A> &after(std::vector<Factors<A>> &factors, int k) { return factors[factors.size() > 1 ? std::size_t(k) : 0]; }
    Factors<A> &lefts() { return left.back(); }
    Factors<A> &rights() { return right.back(); }

    // ---- how a task walks its rows

    // The rows of a chunk, from the first to before the last.
    std::pair<int64_t, int64_t> rows_of(int64_t task) const {
        int64_t first = task / chunks * plan.far, from = task % chunks * rows;
        return {first + from, first + std::min(from + rows, plan.far)};
    }
    template <class OnRow> void each_row(int64_t task, OnRow &&on_row) {
        for (auto [r, end] = rows_of(task); r < end; ++r) on_row(r);
    }
    // Also a sum a lane of on_lane(at, r).
    template <class OnRow, class OnLane> void sweep(int64_t task, OnRow &&on_row, OnLane &&on_lane) {
        auto [from, to] = rows_of(task);
        sum_rows(&partial[std::size_t(task * n)], from, to, on_row, on_lane);
    }

    // each(set's first lane among all, sum over chunks and lanes).
    template <class Each> void merged(int64_t group, Each &&each) {
        for (int64_t k = 0; k < plan.kept; ++k) {
            double total = 0;
            for (int64_t c = 0; c < chunks; ++c) {
                const A *from = &partial[std::size_t((group * chunks + c) * n + k * plan.inner)];
                for (int64_t i = 0; i < plan.inner; ++i) total += double(from[i]);
            }
            each(group * n + k * plan.inner, total);
        }
    }
    void fill(std::vector<A> &lanes, int64_t first, double value) { std::fill_n(&lanes[std::size_t(first)], plan.inner, A(value)); }

    const A *of_group(const std::vector<A> &lanes, int64_t task) const { return &lanes[std::size_t(task / chunks * n)]; }

    // ---- from sums to factors

    double inverse(double square, A &free) const {
        double root = std::sqrt(square);
        free = root > plan.eps ? A(1) : A(0);
        return 1 / (root < plan.eps ? plan.eps : root);
    }
    // Of a zero row the product would grow beyond every number; of zeros any finite one gives the same.
    static double bounded(double product) { return std::min(product, double(std::numeric_limits<A>::max()) / 2); }

    void merge(int k, int64_t group) {
        Factors<A> &l = after(left, k), &l_next = after(left, k + 1), &r = after(right, k), &r_next = after(right, k + 1);
        for (int64_t i = group * plan.far; ruiz && i < (group + 1) * plan.far; ++i)
            l_next.product[i] = A(bounded(double(l.product[i]) * l_next.last[i]));
        merged(group, [&](int64_t first, double total) {
            A free;
            double found = inverse(total, free);
            if (ruiz) {
                found = std::sqrt(found);
                fill(r_next.last, first, found);
                found = bounded(double(r.product[std::size_t(first)]) * found);
            }
            fill(r_next.product, first, found);
            fill(r_next.free, first, free);
        });
    }

    // With l = 1 / norm, dl/dx = -l^3 x, and with l = norm^(-1/2), dl/dx = -(1/2) l^5 x; nothing where the floor holds, however large that
    // power is there.
    static double cube(double l, double free) { return free != 0 ? l * l * l : 0; }
    static double fifth(double l, double free) { return free != 0 ? 0.5 * l * l * l * l * l : 0; }

    void merge_slope(int k, int64_t group) {
        const Factors<A> &f = after(right, k + 1);
        merged(group, [&](int64_t first, double total) {
            auto at = std::size_t(first);
            double free = f.free[at], one = lanes_first ? free : cube(f.product[at], free) * factor;
            fill(right_slope, first, total * (ruiz ? fifth(f.last[at], free) : one));
        });
    }

    // ---- one division by both norms

    void measure(int64_t task) {
        Factors<A> &l = lefts();
        sweep(task, [&](int64_t r) {
            if (lanes_first) return;
            auto px = x + r * n;
            l.product[r] = A(inverse(sum_of<A>(n, [=](auto at) { return at(px) * at(px); }), l.free[r]));
        }, [&, this](auto at, int64_t r) {
            auto v = rows_first ? at(x + r * n) * l.product[r] : at(x + r * n);
            return v * v;
        });
    }

    // The factor of a row whose lanes have been scaled already.
    void measure_scaled(int64_t r, const A *by) {
        auto px = x + r * n;
        double square = sum_of<A>(n, [=](auto at) {
            auto v = at(px) * at(by);
            return v * v;
        });
        lefts().product[r] = A(inverse(square, lefts().free[r]));
    }

    // y from x; with constant divisors, which are the same, dx from g.
    void write(int64_t task, const T *from) {
        auto to = static_cast<T *>(call.result);
        const A *by = of_group(rights().product, task);
        each_row(task, [&](int64_t r) {
            if (lanes_first) measure_scaled(r, by);
            A l = lefts().product[r], f = factor;
            const int64_t place = r * n;
            over(n, [=](auto at) { at.put(to + place, at(from + place) * l * at(by) * f); });
        });
    }

    // Sequential: the gradient of what the first division gave is cut along the sets of the second one, and then along those of the first.
    // Simultaneous: y depends on either norm by itself. left_slope and right_slope are what multiplies x in dx.
    void slope(int64_t task) {
        Factors<A> &l = lefts();
        const A *by = of_group(rights().product, task);
        A f = factor;
        sweep(task, [&, this](int64_t r) {
            if (rows_first) return;
            if (lanes_first) measure_scaled(r, by);
            auto px = x + r * n, pg = g + r * n;
            double along = f * sum_of<A>(n, [=](auto at) { return at(pg) * at(px) * at(by); });
            left_slope[r] = A(cube(l.product[r], l.free[r]) * along);
        }, [&, this](auto at, int64_t r) {
            auto vx = at(x + r * n), vg = at(g + r * n);
            A scale = l.product[r];
            if (!lanes_first) return vg * vx * scale;
            auto scaled = vx * at(by);
            return (vg * (scale * f) - scaled * left_slope[r]) * scaled;
        });
    }

    void write_slope(int64_t task) {
        auto dx = static_cast<T *>(call.result);
        const A *by = of_group(rights().product, task), *slopes = of_group(right_slope, task);
        A f = factor;
        each_row(task, [&, this](int64_t r) {
            A l = lefts().product[r], slope = left_slope[r];
            auto px = x + r * n, pg = g + r * n;
            T *to = dx + r * n;
            if (lanes_first) {
                over(n, [=](auto at) { at.put(to, at(by) * (at(pg) * (l * f) - at(px) * at(by) * (at(slopes) + slope))); });
            } else if (!rows_first) {
                over(n, [=](auto at) { at.put(to, at(pg) * at(by) * (l * f) - at(px) * (at(slopes) + slope)); });
            } else {
                auto inner = [=](auto at) { return at(by) * at(pg) * f - at(px) * l * at(slopes); };
                A along = A(sum_of<A>(n, [=](auto at) { return inner(at) * at(px); }) * l) * lefts().free[r];
                over(n, [=](auto at) { at.put(to, l * (inner(at) - at(px) * (l * along))); });
            }
        });
    }

    // ---- Ruiz: by the roots of both norms, several times

    void measure_ruiz(int k, int64_t task) {
        Factors<A> &l = after(left, k), &next = after(left, k + 1);
        const A *by = of_group(after(right, k).product, task);
        sweep(task, [&, this](int64_t r) {
            auto px = x + r * n;
            A scale = l.product[r];
            double square = sum_of<A>(n, [=](auto at) {
                auto v = at(px) * at(by) * scale;
                return v * v;
            });
            next.last[r] = A(std::sqrt(inverse(square, next.free[r])));
        }, [&, this](auto at, int64_t r) {
            auto v = at(x + r * n) * at(by) * l.product[r];
            return v * v;
        });
    }

    // The gradient on its way: what came in, or what the iteration before wrote.
    template <class Use> void with_gradient(int k, Use &&use) {
        if (k == plan.iterations - 1) use(g, factor);
        else if (working.empty()) use(static_cast<const T *>(call.result), A(1));
        else use(static_cast<const A *>(working.data()), A(1));
    }

    void slope_ruiz(int k, int64_t task) {
        Factors<A> &l = after(left, k), &next = after(left, k + 1);
        const A *by = of_group(after(right, k).product, task), *q = of_group(after(right, k + 1).last, task);
        with_gradient(k, [&, this](auto h, A f) {
            sweep(task, [&, this](int64_t r) {
                auto px = x + r * n;
                auto ph = h + r * n;
                double along = sum_of<A>(n, [=](auto at) { return at(ph) * (at(px) * at(by)) * at(q); });
                left_slope[r] = A(fifth(next.last[r], next.free[r]) * along * l.product[r] * f);
            }, [&, this](auto at, int64_t r) { return at(h + r * n) * (at(x + r * n) * at(by) * (l.product[r] * f)) * next.last[r]; });
        });
    }

    void write_slope_ruiz(int k, int64_t task) {
        Factors<A> &l = after(left, k), &next = after(left, k + 1);
        const A *by = of_group(after(right, k).product, task), *q = of_group(after(right, k + 1).last, task);
        const A *slopes = of_group(right_slope, task);
        with_gradient(k, [&, this](auto h, A f) {
            each_row(task, [&, this](int64_t r) {
                A last = next.last[r] * f, scale = l.product[r], slope = left_slope[r];
                const int64_t place = r * n;
                auto to = [&](auto out) {
                    over(n, [&](auto at) {
                        at.put(out + place, at(h + place) * last * at(q) - at(x + place) * at(by) * scale * (at(slopes) + slope));
                    });
                };
                if (k > 0 && !working.empty()) to(working.data());
                else to(static_cast<T *>(call.result));
            });
        });
    }
};

}  // namespace

template <class T> NewJob both_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    return NewJob(new BothJob<T>(plan, call, backward));
}

#define MAKE(T) template NewJob both_job<T>(const NkWeightPlan &, const NkWeightCall &, bool);
NK_EACH_TYPE(MAKE)

}  // namespace nk
