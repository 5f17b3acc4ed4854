// Global response normalization in three steps, forward and backward alike: sums over the positions, what follows from them for each
// channel, and a second look at the elements.
//
// A sample is cut into chunks by its shape alone, and the sums of the chunks are added in order, so that results do not depend on the
// threads. Within a chunk sums are in the accumulation type, beyond it in double.
#include "responses.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "row.h"
#include "typed.h"

namespace nk {
namespace {

// Elements of a chunk; with channels last a few thousand channels still have several positions in one.
constexpr int64_t CHUNK = 16384;
// Columns that are added up at a time.
constexpr int64_t STRIPE = 1024;

struct Chunk {
    int64_t sample, index;
    int64_t channel, channels, position, positions;  // the first one and how many
};

// Chunks of a sample: some channels, or with channels last some positions.
struct Cut {
    const NkResponse &plan;
    int64_t each, number;

    explicit Cut(const NkResponse &plan) : plan(plan) {
        int64_t length = plan.last ? plan.channels : plan.positions, axis = plan.last ? plan.positions : plan.channels;
        each = std::clamp<int64_t>(CHUNK / length, 1, axis);
        number = (axis + each - 1) / each;
    }
    Chunk at(int64_t sample, int64_t index) const {
        int64_t from = index * each;
        if (plan.last) return {sample, index, 0, plan.channels, from, std::min(each, plan.positions - from)};
        return {sample, index, from, std::min(each, plan.channels - from), 0, plan.positions};
    }
    // Where the sums of a chunk are kept: with channels last each chunk has some of every channel.
    int64_t rows() const { return plan.last ? number : 1; }
    int64_t place(const Chunk &c) const { return (c.sample * rows() + (plan.last ? c.index : 0)) * plan.channels + c.channel; }
    int64_t start(const Chunk &c) const {
        int64_t within = plan.last ? c.position * plan.channels : c.channel * plan.positions;
        return c.sample * plan.channels * plan.positions + within;
    }
};

// Adds an element to the S sums of its channel: of x * x alone, or of dy * x and of dy.
template <int S, class At, class T, class V> void add(At at, const T *x, const T *dy, V *sums) {
    V v = at(x), g = v;
    if constexpr (S == 2) g = at(dy), sums[1] += g;
    sums[0] += g * v;
}

// Sums down some columns of a matrix, whose rows are `apart` elements long; `kept` has S times that many columns.
template <int S, class T>
void sum_columns(const T *x, const T *dy, int64_t rows, int64_t columns, int64_t apart, accumulator<T> *kept) {
    using A = accumulator<T>;
    constexpr int64_t ROWS = 4;  // that are added in registers
    std::fill_n(kept, S * columns, A(0));
    for (int64_t r = 0; r < rows; r += ROWS)
        over(columns, [&](auto at) {
            Vec<A> sums[S];
            for (int s = 0; s < S; ++s) sums[s] = at(kept + s * columns);
            for (int64_t i = r; i < std::min(rows, r + ROWS); ++i) add<S>(at, x + i * apart, dy + i * apart, sums);
            for (int s = 0; s < S; ++s) at.put(kept + s * columns, sums[s]);
        });
}

// The sums of a chunk into `found`: sum s of the channel at place p is found[s * apart + p].
template <int S, class T>
void sum_chunk(const Cut &cut, const Chunk &chunk, const T *x, const T *dy, double *found, int64_t apart) {
    using A = accumulator<T>;
    const int64_t start = cut.start(chunk);
    x += start, dy += start, found += cut.place(chunk);
    if (cut.plan.last) {
        A kept[S * STRIPE];
        for (int64_t from = 0; from < chunk.channels; from += STRIPE) {
            int64_t columns = std::min(STRIPE, chunk.channels - from);
            sum_columns<S>(x + from, dy + from, chunk.positions, columns, chunk.channels, kept);
            for (int s = 0; s < S; ++s)
                for (int64_t c = 0; c < columns; ++c) found[s * apart + from + c] = double(kept[s * columns + c]);
        }
        return;
    }
    for (int64_t c = 0; c < chunk.channels; ++c) {
        double sums[S] = {};
        const T *px = x + c * chunk.positions, *pdy = dy + c * chunk.positions;
        sum_over<A>(chunk.positions, sums, [=](auto at, auto *s) { add<S>(at, px, pdy, s); });
        for (int s = 0; s < S; ++s) found[s * apart + c] = sums[s];
    }
}

// total[c] = the sums of all chunks of a sample, or of all samples where energies are shared.
void total(const Cut &cut, int64_t sample, const double *found, double *total) {
    const int64_t channels = cut.plan.channels, rows = cut.rows() * (cut.plan.shared ? cut.plan.samples : 1);
    found += sample * cut.rows() * channels;
    std::copy_n(found, channels, total);
    for (int64_t r = 1; r < rows; ++r)
        for (int64_t c = 0; c < channels; ++c) total[c] += found[r * channels + c];
}

// out = a_c * x + (b_c * dy if TWO, else d_c, which may be null) for every element of a chunk: forward a = gain, d = bias.
template <bool TWO, class T>
void apply_chunk(const Cut &cut, const Chunk &chunk, const T *x, const accumulator<T> *a, const T *dy, const accumulator<T> *b,
                 const accumulator<T> *d, T *out) {
    using A = accumulator<T>;
    const int64_t start = cut.start(chunk);
    x += start, out += start;
    if constexpr (TWO) dy += start;
    // of(values) is what belongs to the elements at `at` of a row.
    auto row = [&](int64_t begin, int64_t n, auto &&of) {
        over(n, [&](auto at) {
            Vec<A> v = of(at, a) * at(x + begin);
            if constexpr (TWO) v += of(at, b) * at(dy + begin);
            else if (d != nullptr) v += of(at, d);
            at.put(out + begin, v);
        });
    };
    if (cut.plan.last) {
        for (int64_t r = 0; r < chunk.positions; ++r)
            row(r * chunk.channels, chunk.channels, [](auto at, const A *values) { return at(values); });
        return;
    }
    for (int64_t c = 0; c < chunk.channels; ++c)
        row(c * chunk.positions, chunk.positions, [k = chunk.channel + c](auto, const A *values) { return splat<A>(values[k]); });
}

// sums(chunk) for all chunks, settle(set) for all sets of energies, apply(chunk) for all chunks: a sample after the other where there are
// enough of them, as it may still be in the cache the second time.
template <class Sums, class Settle, class Apply> void in_steps(const Cut &cut, Sums &&sums, Settle &&settle, Apply &&apply) {
    const NkResponse &plan = cut.plan;
    auto chunk = [&](int64_t task) { return cut.at(task / cut.number, task % cut.number); };
    if (!plan.shared && plan.samples >= 2 * threads())
        return for_each(plan.samples, [&](int64_t sample) {
            for (int64_t i = 0; i < cut.number; ++i) sums(cut.at(sample, i));
            settle(sample);
            for (int64_t i = 0; i < cut.number; ++i) apply(cut.at(sample, i));
        }, grain_of(plan.channels * plan.positions));
    for_each(plan.samples * cut.number, [&](int64_t task) { sums(chunk(task)); });
    for_each(plan.shared ? 1 : plan.samples, settle);
    for_each(plan.samples * cut.number, [&](int64_t task) { apply(chunk(task)); });
}

int64_t elements(const NkResponse &plan) { return plan.samples * plan.channels * plan.positions; }
int64_t sets(const NkResponse &plan) { return plan.shared ? 1 : plan.samples; }
int64_t set_of(const NkResponse &plan, const Chunk &chunk) { return plan.shared ? 0 : chunk.sample; }

double mean_of(const double *values, int64_t n) { return std::accumulate(values, values + n, 0.0) / double(n); }

template <class T>
void forward(const NkResponse &plan, const T *x, const accumulator<T> *weight, const accumulator<T> *bias, T *y, double *energy) {
    using A = accumulator<T>;
    const Cut cut(plan);
    const int64_t channels = plan.channels;
    std::vector<double> found(std::size_t(plan.samples * cut.rows() * channels));
    std::vector<A> gain(std::size_t(sets(plan) * channels));
    in_steps(cut, [&](const Chunk &chunk) { sum_chunk<1, T>(cut, chunk, x, x, found.data(), 0); }, [&](int64_t set) {
        double *g = energy + set * channels;
        total(cut, set, found.data(), g);
        for (int64_t c = 0; c < channels; ++c) g[c] = std::sqrt(g[c]);
        double divisor = mean_of(g, channels) + plan.eps;
        for (int64_t c = 0; c < channels; ++c)
            gain[std::size_t(set * channels + c)] = A(1 + (weight == nullptr ? 1 : double(weight[c])) * (g[c] / divisor));
    }, [&](const Chunk &chunk) {
        apply_chunk<false, T>(cut, chunk, x, gain.data() + set_of(plan, chunk) * channels, nullptr, nullptr, bias, y);
    });
}

// With D_c = sum of dy x and share s: dweight = D s; the energy's gradient is e_c = (w_c D_c - mean over k of w_k D_k s_k) / divisor, and
// dx = dy * gain + x * e_c / energy_c.
template <class T>
void backward(const NkResponse &plan, const T *dy, const T *x, const accumulator<T> *weight, const double *energy, T *dx,
              accumulator<T> *dweight, accumulator<T> *dbias) {
    using A = accumulator<T>;
    const Cut cut(plan);
    const int64_t channels = plan.channels, apart = plan.samples * cut.rows() * channels, all = sets(plan) * channels;
    auto doubles = [](int64_t n) { return std::vector<double>(std::size_t(n)); };
    std::vector<double> found = doubles(2 * apart), products = doubles(all), sums = doubles(all);
    std::vector<A> of_x(std::size_t(all), A(0)), of_dy(std::size_t(all), A(0));
    in_steps(cut, [&](const Chunk &chunk) { sum_chunk<2, T>(cut, chunk, x, dy, found.data(), apart); }, [&](int64_t set) {
        const double *g = energy + set * channels;
        double *product = products.data() + set * channels, divisor = mean_of(g, channels) + plan.eps, common = 0;
        total(cut, set, found.data(), product);
        total(cut, set, found.data() + apart, sums.data() + set * channels);
        auto scaled = [&](int64_t c) { return weight == nullptr ? 1.0 : double(weight[c]); };
        for (int64_t c = 0; c < channels; ++c) common += scaled(c) * product[c] * (g[c] / divisor);
        common /= double(channels);
        for (int64_t c = 0; c < channels; ++c) {
            auto at = std::size_t(set * channels + c);
            double slope = (scaled(c) * product[c] - common) / divisor;
            of_x[at] = g[c] == 0 ? A(0) : A(slope / g[c]);  // the norm's derivative at 0 is taken to be 0
            of_dy[at] = A(1 + scaled(c) * (g[c] / divisor));
            product[c] *= g[c] / divisor;
        }
    }, [&](const Chunk &chunk) {
        if (dx == nullptr) return;
        int64_t set = set_of(plan, chunk) * channels;
        apply_chunk<true, T>(cut, chunk, x, of_x.data() + set, dy, of_dy.data() + set, nullptr, dx);
    });
    auto deliver = [&](const std::vector<double> &from, A *to) {
        for (int64_t c = 0; to != nullptr && c < channels; ++c) {
            double sum = 0;
            for (int64_t set = 0; set < sets(plan); ++set) sum += from[std::size_t(set * channels + c)];
            to[c] = A(sum);
        }
    };
    deliver(products, dweight);
    deliver(sums, dbias);
}

}  // namespace
}  // namespace nk

// x, y, dy and dx are samples * channels * positions elements of the plan's type; weight, bias, dweight and dbias `channels` elements of its
// accumulation type; `energy` is `channels` doubles for each sample, or once where energies are shared. Weight and bias are null where
// plan.parts says so.
NK_EXPORT int32_t nk_response_forward(const NkResponse *plan, const void *x, const void *weight, const void *bias, void *y,
                                      double *energy) {
    using namespace nk;
    if (!agrees(plan->parts, NK_WEIGHT, weight) || !agrees(plan->parts, NK_BIAS, bias)) return NK_NULL;
    return enter(plan->type, elements(*plan), [&](auto t) {
        using T = decltype(t);
        using A = accumulator<T>;
        forward<T>(*plan, static_cast<const T *>(x), static_cast<const A *>(weight), static_cast<const A *>(bias), static_cast<T *>(y), energy);
    }, x, y, energy);
}

// dx, dweight and dbias may be null: they are not wanted then. The bias itself is not needed.
NK_EXPORT int32_t nk_response_backward(const NkResponse *plan, const void *dy, const void *x, const void *weight, const double *energy,
                                       void *dx, void *dweight, void *dbias) {
    using namespace nk;
    if (!agrees(plan->parts, NK_WEIGHT, weight)) return NK_NULL;
    return enter(plan->type, elements(*plan), [&](auto t) {
        using T = decltype(t);
        using A = accumulator<T>;
        backward<T>(*plan, static_cast<const T *>(dy), static_cast<const T *>(x), static_cast<const A *>(weight), energy,
                    static_cast<T *>(dx), static_cast<A *>(dweight), static_cast<A *>(dbias));
    }, dy, x, energy);
}
