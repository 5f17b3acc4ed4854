// A matrix over its largest singular value, by warm power iteration.
//
// u <- W v / |W v| and v <- W^T u / |W^T u| take one traversal: while a row is in the cache, its product with v is known and scales what it
// adds to W^T u; the length of u comes out of the sum. And sigma = u^T W v is that sum's product with v.
#include <algorithm>
#include <numeric>
#include <vector>

#include "weights.h"

namespace nk {

namespace {

enum Step { ITERATE, IMPROVE, SIGMA, INVERT, WRITE, SLOPE, MERGE_SLOPE, WRITE_GRADIENT };

template <class T> class SpectralJob final : public Job, Bands {
    using A = accumulator<T>;

    const NkWeightPlan plan;
    const T *const w, *const g;
    T *const result, *const left, *const right;
    A *const inverse, *const u, *const v;
    std::vector<Step> steps;
    std::vector<A> product;  // W v
    std::vector<A> partial;  // chunks x n, of W^T W v
    std::vector<double> sums;
    double total = 0;

public:
    SpectralJob(const NkWeightPlan &p, const NkWeightCall &call, bool backward)
        : Bands(p, 32, sizeof(T)), plan(p), w(static_cast<const T *>(call.weight)), g(static_cast<const T *>(call.gradient)),
          result(static_cast<T *>(call.result)), left(static_cast<T *>(call.left)), right(static_cast<T *>(call.right)),
          inverse(static_cast<A *>(call.kept)), u(inverse + 1), v(inverse + 1 + p.far), sums(std::size_t(chunks)) {
        if (backward) {
            steps = {SLOPE, MERGE_SLOPE, WRITE_GRADIENT};
            return;
        }
        for (int64_t i = 0; i < p.far; ++i) u[i] = widen(left[i]);
        for (int64_t j = 0; j < n; ++j) v[j] = widen(right[j]);
        if (p.iterations > 0) {
            product.resize(std::size_t(p.far));
            partial.resize(std::size_t(chunks * n));
        }
        for (int k = 0; k < p.iterations; ++k) steps.insert(steps.end(), {ITERATE, IMPROVE});
        // Vectors that are kept in a half type are not those that the last sum belongs to.
        if (p.iterations == 0 || sizeof(T) < sizeof(A)) steps.insert(steps.end(), {SIGMA, INVERT});
        steps.push_back(WRITE);
    }

    int64_t tasks(int phase) const override {
        if (std::size_t(phase) >= steps.size()) return 0;
        Step step = steps[std::size_t(phase)];
        return step == IMPROVE || step == INVERT || step == MERGE_SLOPE ? 1 : chunks;
    }

    void run(int phase, int64_t task) override {
        int64_t from = task * rows, to = std::min(from + rows, plan.far);
        switch (steps[std::size_t(phase)]) {
            case ITERATE: return add_rows(task, product.data(), [this](int64_t r) { product[std::size_t(r)] = A(dot(w + r * n, v, n)); });
            case IMPROVE: return improve(steps[std::size_t(phase) + 1] != ITERATE);
            case SIGMA: return sigma(task, from, to);
            case INVERT: return invert(sum());
            case WRITE: return over((to - from) * n, [y = result + from * n, x = w + from * n, by = *inverse](auto at) { at.put(y, at(x) * by); });
            case SLOPE: sums[std::size_t(task)] = dot(w + from * n, g + from * n, (to - from) * n); return;
            case MERGE_SLOPE: total = std::abs(*inverse) < most() ? sum() * double(*inverse) : 0; return;
            case WRITE_GRADIENT: return write_gradient(from, to);
        }
    }

private:
    double sum() const { return std::accumulate(sums.begin(), sums.end(), 0.0); }
    template <class P> static double length(const P &values, int64_t n) {
        double square = 0;
        for (int64_t i = 0; i < n; ++i) square += double(values[i]) * double(values[i]);
        return std::sqrt(square);
    }
    template <class X, class Y> static double dot(const X *x, const Y *y, int64_t n) {
        return sum_of<A>(n, [=](auto at) { return at(x) * at(y); });
    }

    // A chunk's part of W^T by; before(r) sets the number that a row is multiplied with.
    template <class Before> void add_rows(int64_t chunk, const A *by, Before &&before) {
        sum_rows(&partial[std::size_t(chunk * n)], chunk * rows, std::min((chunk + 1) * rows, plan.far), before,
                 [=, this](auto at, int64_t r) { return at(w + r * n) * by[r]; });
    }

    // A product as short as eps has no direction and leaves its vector as it was.
    void improve(bool last) {
        double size = length(product, plan.far), shrink = 1 / size;
        if (size > plan.eps || size != size) {
            for (int64_t i = 0; i < plan.far; ++i) u[i] = A(double(product[std::size_t(i)]) / size);
        } else {
            for (int64_t c = 0; c < chunks; ++c) add_rows(c, u, [](int64_t) {});
            shrink = 1;
        }
        A *sum = partial.data();
        for (int64_t j = 0; j < n; ++j) {
            double lanes = 0;
            for (int64_t c = 0; c < chunks; ++c) lanes += double(partial[std::size_t(c * n + j)]);
            sum[j] = A(lanes * shrink);
        }
        double along = length(partial, n);
        if (along > plan.eps || along != along)
            for (int64_t j = 0; j < n; ++j) v[j] = A(double(sum[j]) / along);
        if (!last) return;
        double found = dot(sum, v, n);
        for (int64_t i = 0; i < plan.far; ++i) left[i] = narrow<T>(u[i]), u[i] = widen(left[i]);
        for (int64_t j = 0; j < n; ++j) right[j] = narrow<T>(v[j]), v[j] = widen(right[j]);
        invert(found);
    }

    void sigma(int64_t task, int64_t from, int64_t to) {
        double all = 0;
        for (int64_t r = from; r < to; ++r) all += double(u[r]) * dot(w + r * n, v, n);
        sums[std::size_t(task)] = all;
    }
    // What is written for sigma at the floor, by which backward knows it again.
    A most() const { return A(1) / A(plan.eps); }

    void invert(double sigma) { *inverse = std::abs(sigma) > plan.eps ? A(1 / sigma) : most(); }

    void write_gradient(int64_t from, int64_t to) {
        A scale = *inverse;
        for (int64_t r = from; r < to; ++r) {
            A along = A(total * double(u[r]) * double(scale));
            over(n, [=, this](auto at) { at.put(result + r * n, at(g + r * n) * scale - at(v) * along); });
        }
    }
};

}  // namespace

template <class T> NewJob spectral_job(const NkWeightPlan &plan, const NkWeightCall &call, bool backward) {
    return NewJob(new SpectralJob<T>(plan, call, backward));
}

#define MAKE(T) template NewJob spectral_job<T>(const NkWeightPlan &, const NkWeightCall &, bool);
NK_EACH_TYPE(MAKE)

}  // namespace nk
