// NK_NORMALIZE over sets whose elements lie next to one another: the rows of most layers. A row is measured and, while it is in the cache,
// written; so memory is walked once.
#include <algorithm>

#include "weights.h"

namespace nk {

namespace {

constexpr int64_t LONG = 4 * GRAIN;

// What one row needs to be written. In double precision, as it is once a row.
struct Row {
    double center = 0, shift = 0;  // the mean in two parts: the second is what is left after subtracting the first
    double inverse = 0, strength = 0;
};

template <class T> double mean_of(const T *x, int64_t n) {
    double total[1] = {};
    sum_over<accumulator<T>>(n, total, [x](auto at, auto *sums) { sums[0] += at(x); });
    return total[0] / double(n);
}

Row measured(const NkPlan &statistic, double center, double sum, double square) {
    double n = double(set_size(statistic)), shift = sum / n;
    Row row{center, shift, 0, 0};
    row.inverse = inverse_scale<double>(statistic, statistic.centred ? positive(square - n * shift * shift) : square);
    row.strength = strength<double>(statistic, row.inverse);
    return row;
}

template <class T> void forward_row(const NkPlan &statistic, const T *x, double gain, T *y) {
    using A = accumulator<T>;
    int64_t n = statistic.inner;
    if (!statistic.centred) {
        double sums[1] = {};
        sum_over<A>(n, sums, [x](auto at, auto *s) {
            auto v = at(x);
            s[0] += v * v;
        });
        A factor = A(gain * inverse_scale<double>(statistic, sums[0]));
        return over(n, [=](auto at) { at.put(y, at(x) * factor); });
    }
    A center = A(mean_of(x, n));
    double sums[2] = {};
    sum_over<A>(n, sums, [=](auto at, auto *s) {
        auto v = at.template only<A>(at(x) - center);
        s[0] += v;
        s[1] += v * v;
    });
    Row row = measured(statistic, center, sums[0], sums[1]);
    A factor = A(gain * row.inverse), shift = A(row.shift);
    over(n, [=](auto at) { at.put(y, (at(x) - center - shift) * factor); });
}

// The gradient of the raw row, and that of its gain as the return value.
template <class T> double backward_row(const NkPlan &statistic, const T *x, const T *g, double gain, bool constant, T *dx) {
    using A = accumulator<T>;
    int64_t n = statistic.inner;
    double along;
    if (!statistic.centred) {
        double sums[2] = {};
        sum_over<A>(n, sums, [=](auto at, auto *s) {
            auto v = at(x);
            s[0] += v * v;
            s[1] += v * at(g);
        });
        Row row = measured(statistic, 0, 0, sums[0]);
        along = sums[1] * row.inverse;
        A factor = A(gain * row.inverse), back = constant ? A(0) : A(gain * row.inverse * row.inverse * row.strength * along);
        over(n, [=](auto at) { at.put(dx, at(g) * factor - at(x) * back); });
        return along;
    }
    A center = A(mean_of(x, n));
    double sums[4] = {};
    sum_over<A>(n, sums, [=](auto at, auto *s) {
        auto v = at.template only<A>(at(x) - center);
        auto d = at(g);
        s[0] += v;
        s[1] += v * v;
        s[2] += d;
        s[3] += v * d;
    });
    Row row = measured(statistic, center, sums[0], sums[1]);
    along = (sums[3] - row.shift * sums[2]) * row.inverse;
    double size = gain * row.inverse;
    A factor = A(size), shift = A(row.shift), mean = A(sums[2] / double(n)), back = A(size * row.inverse * row.strength * along);
    over(n, [=](auto at) { at.put(dx, (at(g) - mean) * factor - (at(x) - center - shift) * back); });
    return along;
}

// Sets too long, or too few, for one thread each: far pieces of them, merged. A set is far = 1, kept = 1 in the terms of apart_job.
NkWeightPlan as_apart(const NkWeightPlan &plan) {
    NkWeightPlan p = plan;
    p.groups = plan.groups * plan.far;
    p.inner = plan.kept * plan.inner;
    p.far = p.kept = 1;
    p.sets = NK_APART;
    return p;
}

template <class T> struct NearJob final : Job {
    NkWeightPlan plan;
    NkWeightCall call;
    bool backward;

    NearJob(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) : plan(plan), call(call), backward(backward) {}
    int64_t tasks(int phase) const override { return phase > 0 ? 0 : ceil_div(plan.groups * plan.far, rows_a_task(plan)); }
    void run(int, int64_t task) override {
        int64_t many = rows_a_task(plan), begin = task * many;
        near_rows<T>(plan, call, backward, begin, std::min(begin + many, plan.groups * plan.far));
    }
};

}  // namespace

bool fits_rows(const NkWeightPlan &plan) {
    int64_t n = plan.kept * plan.inner;
    return n <= LONG || (n <= 64 * GRAIN && plan.groups * plan.far >= 256);
}

int64_t rows_a_task(const NkWeightPlan &plan) { return at_least_one(GRAIN / at_least_one(plan.kept * plan.inner)); }

template <class T> void near_rows(const NkWeightPlan &plan, const NkWeightCall &call, bool backward, int64_t begin, int64_t end) {
    int64_t n = plan.kept * plan.inner;
    NkPlan statistic = statistic_of(plan, n);
    auto x = static_cast<const T *>(call.weight), gains = static_cast<const T *>(call.gain);
    auto g = static_cast<const T *>(call.gradient);
    auto y = static_cast<T *>(call.result), dgain = static_cast<T *>(call.dgain);
    for (int64_t row = begin; row < end; ++row) {
        double gain = plan.factor * (gains ? double(widen(gains[row])) : 1.0);
        if (!backward) {
            forward_row(statistic, x + row * n, gain, y + row * n);
            continue;
        }
        double along = backward_row(statistic, x + row * n, g + row * n, gain, plan.constant, y + row * n);
        if (dgain) dgain[row] = narrow<T>(accumulator<T>(plan.factor * along));
    }
}

template <class T> NewJob near_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    if (!fits_rows(plan)) return apart_job<T>(as_apart(plan), call, backward);
    return NewJob(new NearJob<T>(plan, call, backward));
}

#define MAKE(T)                                                                                     \
    template void near_rows<T>(const NkWeightPlan &, const NkWeightCall &, bool, int64_t, int64_t); \
    template NewJob near_job<T>(const NkWeightPlan &, const NkWeightCall &, bool);
NK_EACH_TYPE(MAKE)

}  // namespace nk
