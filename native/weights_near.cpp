// NK_NORMALIZE over sets whose elements lie next to one another: the rows of most layers. A row is measured and, while it is in the cache,
// written; so memory is walked once. Backward measures it again in the traversal that sums the gradient.
#include <algorithm>

#include "weights.h"

namespace nk {

namespace {

// What one row needs to be written. In double precision, as it is once a row.
struct Row {
    double center = 0, shift = 0;    // the mean in two parts: the second is what is left after subtracting the first
    double factor = 0;               // gain times 1 / scale
    double mean = 0, back = 0;       // of the gradient; what of the row is taken from it
};

template <class T> class Rows {
    using A = accumulator<T>;
    const NkPlan statistic;
    const int64_t n;
    const bool constant;

public:
    Rows(const NkWeightPlan &plan, int64_t n) : statistic(statistic_of(plan, n)), n(n), constant(plan.constant) {}

    Row measure(const T *x, double gain) const {
        Row row;
        double sums[2] = {};
        if (!statistic.centred) {
            double square[1] = {};
            sum_over<A>(n, square, [x](auto at, auto *s) {
                auto v = at(x);
                s[0] += v * v;
            });
            row.factor = gain * inverse_scale<double>(statistic, square[0]);
            return row;
        }
        about_mean(x, row, sums, [=](auto, Vec<A> v, auto *s) {
            s[0] += v;
            s[1] += v * v;
        });
        row.factor = gain * inverse_of(row, sums);
        return row;
    }
    void write(const T *x, const Row &row, T *y) const {
        A factor = A(row.factor), center = A(row.center), shift = A(row.shift);
        if (!statistic.centred) over(n, [=](auto at) { at.put(y, at(x) * factor); });
        else over(n, [=](auto at) { at.put(y, (at(x) - center - shift) * factor); });
    }

    // Also the gradient of the gain.
    Row measure(const T *x, const T *g, double gain, double &dgain) const {
        Row row;
        double sums[4] = {}, inverse;
        if (!statistic.centred) {
            double two[2] = {};
            sum_over<A>(n, two, [=](auto at, auto *s) {
                auto v = at(x);
                s[0] += v * v;
                s[1] += v * at(g);
            });
            inverse = inverse_scale<double>(statistic, two[0]);
            dgain = two[1] * inverse;
        } else {
            about_mean(x, row, sums, [=](auto at, Vec<A> v, auto *s) {
                auto d = at(g);
                s[0] += v;
                s[1] += v * v;
                s[2] += d;
                s[3] += v * d;
            });
            inverse = inverse_of(row, sums);
            dgain = (sums[3] - row.shift * sums[2]) * inverse;
            row.mean = sums[2] / double(n);
        }
        row.factor = gain * inverse;
        if (!constant) row.back = row.factor * inverse * strength<double>(statistic, inverse) * dgain;
        return row;
    }
    void write(const T *x, const T *g, const Row &row, T *dx, bool far) const {
        A factor = A(row.factor), center = A(row.center), shift = A(row.shift), mean = A(row.mean), back = A(row.back);
        if (!statistic.centred) over(n, [=](auto at) { at.put(dx, at(g) * factor - at(x) * back, far); });
        else over(n, [=](auto at) { at.put(dx, (at(g) - mean) * factor - (at(x) - center - shift) * back, far); });
    }

private:
    // Sums of terms(at, x - center, sums), the first two of which are those of x - center and of its square. The center is the mean of the
    // row's first elements, or, where that is over half a deviation from the mean of all, this one.
    template <int K, class Terms> void about_mean(const T *x, Row &row, double (&sums)[K], Terms &&terms) const {
        double first[1] = {};
        int64_t some = std::min<int64_t>(n, 4 * LANES);
        sum_over<A>(some, first, [x](auto at, auto *s) { s[0] += at(x); });
        row.center = double(A(first[0] / double(some)));
        for (int attempt = 1; attempt <= 2; ++attempt) {
            A center = A(row.center);
            std::fill_n(sums, K, 0.0);
            sum_over<A>(n, sums, [=](auto at, auto *s) { terms(at, at.template only<A>(at(x) - center), s); });
            double lost = sums[0] * sums[0] / double(n);
            if (!(4 * lost > sums[1] - lost)) break;
            if (attempt == 1) row.center = double(A(row.center + sums[0] / double(n)));
        }
        row.shift = sums[0] / double(n);
    }
    double inverse_of(const Row &row, const double *sums) const {
        double square = sums[1] - double(n) * row.shift * row.shift;
        return inverse_scale<double>(statistic, square < 0 ? 0 : square);
    }
};

}  // namespace

template <class T> void near_rows(const NkWeightPlan &plan, const NkWeightCall &call, bool backward, int64_t begin, int64_t end) {
    const int64_t n = plan.kept * plan.inner;
    const Rows<T> rows(plan, n);
    auto x = static_cast<const T *>(call.weight), gains = static_cast<const T *>(call.gain), g = static_cast<const T *>(call.gradient);
    auto y = static_cast<T *>(call.result), dgain = static_cast<T *>(call.dgain);
    // From a row's sums to its factor it is a long way of short steps: those of a few short rows overlap.
    const int64_t bytes = n * int64_t(sizeof(T)), few = bytes <= 1024 ? 4 : bytes <= 4096 ? 2 : 1;
    const bool far = size_of(plan) * int64_t(sizeof(T)) >= (1 << 21) && n % LANES == 0 && until_line(y) == 0;  // the optimizer's, later
    for (; begin < end; begin += few) {
        Row found[4];
        const int64_t many = std::min(few, end - begin);
        for (int64_t i = 0; i < many; ++i) {
            int64_t row = begin + i, at = row * n;
            double gain = plan.factor * (gains ? double(widen(gains[row])) : 1.0), along = 0;
            found[i] = backward ? rows.measure(x + at, g + at, gain, along) : rows.measure(x + at, gain);
            if (dgain) dgain[row] = narrow<T>(accumulator<T>(plan.factor * along));
        }
        for (int64_t i = 0; i < many; ++i) {
            int64_t at = (begin + i) * n;
            backward ? rows.write(x + at, g + at, found[i], y + at, far) : rows.write(x + at, found[i], y + at);
        }
    }
    if (far) end_of_stream();
}

#define MAKE(T) template void near_rows<T>(const NkWeightPlan &, const NkWeightCall &, bool, int64_t, int64_t);
NK_EACH_TYPE(MAKE)

}  // namespace nk
