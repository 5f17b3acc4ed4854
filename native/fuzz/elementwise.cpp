// What works element by element: dropout, and the gate of a gated norm.
#include <algorithm>
#include "fuzz.h"

namespace fuzz {
namespace {

// Zero or scaled, as often as asked for, the same whatever the threads and however many elements follow.
void one_dropout(Random &random) {
    int32_t type = int32_t(random.below(4));
    int64_t n = 1 + random.below(40000), seed = random.below(1 << 30);
    double p = random.pick({0.0, 0.1, 0.5, 0.9});
    Buffer x = Buffer::normal(random, type, n, 3), y(type, n), part(type, (n + 1) / 2);
    auto drop = function<int32_t(int64_t, int64_t, int64_t, double, const void *, void *)>("nk_dropout");
    on_any_threads(random, [&] { return drop(type, n, seed, p, x.data(), y.data()); }, {&y});
    answers([&] { return drop(type, (n + 1) / 2, seed, p, x.data(), part.data()); });
    double dropped = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (i < (n + 1) / 2 && part[i] != y[i]) throw Mismatch("dropout depends on what follows");
        if (y[i] == 0) dropped += x[i] != 0;
        else expect("dropout", y, i, x[i] / (1 - p), std::fabs(x[i] / (1 - p)), type == NK_FLOAT64 ? 1e-15 : 1e-7);
    }
    if (std::fabs(dropped - double(n) * p) > 6 * std::sqrt(double(n) * p * (1 - p)) + 1) throw Mismatch("dropout drops too many or too few");
}

// Products and both gradients, of each type and width.
void one_gate(Random &random) {
    int32_t type = int32_t(random.below(4)), sum = type == NK_FLOAT64 ? NK_FLOAT64 : NK_FLOAT32;
    int64_t n = 1 + random.below(40000), wide = random.below(3);
    int32_t of_x = wide == NK_WIDE_X ? sum : type, of_y = wide == NK_WIDE_Y ? sum : type;
    Buffer x = Buffer::normal(random, of_x, n, 3), z = Buffer::normal(random, type, n, 3), y(of_y, n);
    Buffer dy = Buffer::normal(random, of_y, n, 1), dx(of_x, n), dz(type, n);
    auto gate = function<int32_t(int64_t, int64_t, int64_t, const void *, const void *, void *)>("nk_gate");
    auto back = function<int32_t(int64_t, int64_t, int64_t, const void *, const void *, const void *, void *, void *)>("nk_gate_backward");
    on_any_threads(random, [&] { return gate(type, wide, n, x.data(), z.data(), y.data()); }, {&y});
    on_any_threads(random, [&] { return back(type, wide, n, dy.data(), x.data(), z.data(), dx.data(), dz.data()); }, {&dx, &dz});
    const double near = type == NK_FLOAT64 ? 1e-14 : 2e-6;
    for (int64_t i = 0; i < n; ++i) {
        double open = 1 / (1 + std::exp(-z[i])), silu = z[i] * open;
        expect("gate", y, i, x[i] * silu, std::fabs(x[i] * z[i]), near);
        expect("gate's dx", dx, i, dy[i] * silu, std::fabs(dy[i] * z[i]), near);
        expect("gate's dz", dz, i, dy[i] * x[i] * open * (1 + z[i] * (1 - open)), std::fabs(dy[i] * x[i]) * (1 + std::fabs(z[i])), near);
    }
}

const Fuzzer gate{"gate", one_gate};
const Fuzzer dropout{"dropout", one_dropout};

}  // namespace
}  // namespace fuzz
