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

template <class T, bool CENTRED, bool BACKWARD> class Rows {
    using A = accumulator<T>;
    const NkPlan statistic;
    const int64_t n;
    const bool constant;

public:
    Rows(const NkWeightPlan &plan, int64_t n) : statistic(statistic_of(plan, n)), n(n), constant(plan.constant) {}

    // Backward, the gradient of the gain too.
    Row measure(const T *x, const T *g, double gain, double &dgain) const {
        Row row;
        double sums[BACKWARD ? 4 : 2] = {};
        auto terms = [=](auto at, Vec<A> v, auto *s) {
            if constexpr (CENTRED) s[0] += v;
            s[1] += v * v;
            if constexpr (BACKWARD && CENTRED) s[2] += at(g);
            if constexpr (BACKWARD) s[3] += v * at(g);
        };
        if constexpr (CENTRED) about_mean(x, row, sums, terms);
        else sum_over<A>(n, sums, [=](auto at, auto *s) { terms(at, at(x), s); });
        const double square = sums[1] - double(n) * row.shift * row.shift, inverse = inverse_scale<double>(statistic, square < 0 ? 0 : square);
        row.factor = gain * inverse;
        if constexpr (BACKWARD) {
            dgain = (sums[3] - row.shift * sums[2]) * inverse;
            row.mean = sums[2] / double(n);
            if (!constant) row.back = row.factor * inverse * strength<double>(statistic, inverse) * dgain;
        }
        return row;
    }

    // Forward y, backward dx.
    void write(const T *x, const T *g, const Row &row, T *out, bool far) const {
        A factor = A(row.factor), center = A(row.center), shift = A(row.shift), mean = A(row.mean), back = A(row.back);
        over(n, [=](auto at) {
            Vec<A> v = at(x);
            if constexpr (CENTRED) v = v - center - shift;
            if constexpr (!BACKWARD) at.put(out, v * factor);
            else if constexpr (CENTRED) at.put(out, (at(g) - mean) * factor - v * back, far);
            else at.put(out, at(g) * factor - v * back, far);
        });
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
};

template <class T, bool CENTRED, bool BACKWARD> void normalize_rows(const NkWeightPlan &plan, const NkWeightCall &call, int64_t begin, int64_t end) {
    const int64_t n = plan.kept * plan.inner;
    const Rows<T, CENTRED, BACKWARD> rows(plan, n);
    auto x = static_cast<const T *>(call.weight), gains = static_cast<const T *>(call.gain), g = static_cast<const T *>(call.gradient);
    auto y = static_cast<T *>(call.result), dgain = static_cast<T *>(call.dgain);
    // From a row's sums to its factor it is a long way of short steps: those of a few short rows overlap.
    const int64_t bytes = n * int64_t(sizeof(T)), few = bytes <= 1024 ? 4 : bytes <= 4096 ? 2 : 1;
    // A gradient is the optimizer's, later.
    const bool far = BACKWARD && size_of(plan) * int64_t(sizeof(T)) >= (1 << 21) && n % LANES == 0 && until_line(y) == 0;
    for (; begin < end; begin += few) {
        Row found[4];
        const int64_t many = std::min(few, end - begin);
        for (int64_t i = 0; i < many; ++i) {
            int64_t row = begin + i;
            double gain = plan.factor * (gains ? double(widen(gains[row])) : 1.0), dgain_row = 0;
            found[i] = rows.measure(x + row * n, along(g, row * n), gain, dgain_row);
            if (dgain) dgain[row] = narrow<T>(accumulator<T>(plan.factor * dgain_row));
        }
        for (int64_t i = 0, at = begin * n; i < many; ++i, at += n) rows.write(x + at, along(g, at), found[i], y + at, far);
    }
    if (far) end_of_stream();
}

}  // namespace

template <class T> void near_rows(const NkWeightPlan &plan, const NkWeightCall &call, bool backward, int64_t begin, int64_t end) {
    auto rows = plan.centred ? (backward ? normalize_rows<T, true, true> : normalize_rows<T, true, false>)
                             : (backward ? normalize_rows<T, false, true> : normalize_rows<T, false, false>);
    rows(plan, call, begin, end);
}

#define MAKE(T) template void near_rows<T>(const NkWeightPlan &, const NkWeightCall &, bool, int64_t, int64_t);
NK_EACH_TYPE(MAKE)

}  // namespace nk
