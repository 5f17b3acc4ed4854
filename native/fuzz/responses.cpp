// Local and global response normalization, forward and backward, against their definitions in plain loops.
#include <algorithm>

#include "../responses.h"
#include "fuzz.h"

namespace fuzz {
namespace {

int64_t length(Random &random, int64_t most) {
    int64_t n = random.chance(0.1) ? 1 + random.below(2500) : 1 + random.below(random.pick({1, 4, 20, 70, 200}));
    return std::max<int64_t>(1, std::min(n, most));
}

void cut(Random &random, int64_t room, std::vector<int64_t *> sizes) {
    std::shuffle(sizes.begin(), sizes.end(), random.engine);  // each may be the one that gets the room
    for (int64_t *size : sizes) room /= *size = length(random, room);
}

int64_t room_of(Random &random) { return random.chance(0.05) ? 60000 : 4000; }

double looseness(int32_t type) { return type == NK_FLOAT64 ? 1e-13 : 5e-6; }

void local(Random &random) {
    NkWindow plan{};
    cut(random, room_of(random), {&plan.outer, &plan.channels, &plan.inner});
    plan.before = random.below(std::min<int64_t>(plan.channels, random.pick({3, 9, 40, 3000})));
    plan.after = random.below(std::min<int64_t>(plan.channels, random.pick({3, 9, 40, 3000})));
    plan.offset = random.pick({0.5, 1.0, 2.0});
    plan.factor = random.pick({1e-4, 0.1, 1.0});
    plan.power = random.pick({0.0, 0.3, 0.5, 0.75, 1.0, 2.0});
    plan.type = int32_t(random.below(4));
    const int64_t n = plan.outer * plan.channels * plan.inner, step = plan.inner;
    Buffer x = Buffer::normal(random, plan.type, n), dy = Buffer::normal(random, plan.type, n), y(plan.type, n), dx(plan.type, n);
    int64_t poisoned = random.chance(0.1) ? random.below(n) : -1;
    if (poisoned >= 0) x.set(poisoned, NAN);

    auto forward = function<int32_t(const NkWindow *, const void *, void *)>("nk_window_forward");
    auto add_up = function<int32_t(const NkWindow *, const void *, void *)>("nk_window_sum");
    auto backward = function<int32_t(const NkWindow *, const void *, const void *, void *)>("nk_window_backward");
    NkWindow empty = plan;
    *random.pick({&empty.outer, &empty.channels, &empty.inner}) = 0;
    refused("x is null", NK_NULL, [&] { return forward(&plan, nullptr, y.data()); }, {&y});
    refused("nothing to do", NK_OK, [&] { return forward(&empty, nullptr, nullptr); }, {&y});
    on_any_threads(random, [&] { return forward(&plan, x.data(), y.data()); }, {&y});
    on_any_threads(random, [&] { return backward(&plan, dy.data(), x.data(), dx.data()); }, {&dx});
    Buffer total(plan.type, n);
    on_any_threads(random, [&] { return add_up(&plan, x.data(), total.data()); }, {&total});

    std::vector<double> energy(n);
    auto channel = [&](int64_t e) { return e / step % plan.channels; };
    for (int64_t e = 0; e < n; ++e) {
        double sum = 0, straight = 0, size = 0;
        for (int64_t k = std::max(-plan.before, -channel(e)); k <= std::min(plan.after, plan.channels - 1 - channel(e)); ++k) {
            double v = x[e + k * step];
            sum += v * v, straight += v, size += std::fabs(v);
        }
        expect("sum", total, e, straight, size, looseness(plan.type));
        energy[e] = plan.offset + plan.factor * sum;
        double want = x[e] * std::pow(energy[e], -plan.power);
        expect("y", y, e, want, std::fabs(want), looseness(plan.type));
    }
    for (int64_t e = 0; e < n; ++e) {
        double sum = 0, size = 0;
        for (int64_t k = std::max(-plan.after, -channel(e)); k <= std::min(plan.before, plan.channels - 1 - channel(e)); ++k) {
            int64_t at = e + k * step;
            double term = dy[at] * x[at] * std::pow(energy[at], -plan.power - 1);
            sum += term, size += std::fabs(term);
        }
        double straight = dy[e] * std::pow(energy[e], -plan.power), steep = 2 * plan.factor * plan.power * x[e];
        expect("dx", dx, e, straight - steep * sum, std::fabs(straight) + std::fabs(steep) * size, looseness(plan.type));
    }
}

void global(Random &random) {
    NkResponse plan{};
    cut(random, room_of(random), {&plan.samples, &plan.channels, &plan.positions});
    plan.eps = random.pick({1e-6, 1e-3, 0.5});
    plan.type = int32_t(random.below(4));
    plan.last = random.chance(0.5);
    plan.shared = random.chance(0.3);
    const int64_t n = plan.samples * plan.channels * plan.positions, sets = plan.shared ? 1 : plan.samples;
    const int32_t kept = wide(plan.type);
    Buffer x = Buffer::normal(random, plan.type, n), dy = Buffer::normal(random, plan.type, n), y(plan.type, n);
    Buffer weight = random.chance(0.7) ? Buffer::normal(random, kept, plan.channels) : Buffer();
    Buffer bias = random.chance(0.7) ? Buffer::normal(random, kept, plan.channels) : Buffer(), energy(NK_FLOAT64, sets * plan.channels);
    Buffer dx = random.chance(0.9) ? Buffer(plan.type, n) : Buffer();
    Buffer dweight = weight && random.chance(0.8) ? Buffer(kept, plan.channels) : Buffer();
    Buffer dbias = bias && random.chance(0.8) ? Buffer(kept, plan.channels) : Buffer();
    plan.parts = (weight ? NK_WEIGHT : 0) | (bias ? NK_BIAS : 0);
    auto channel = [&](int64_t e) { return plan.last ? e % plan.channels : e / plan.positions % plan.channels; };
    auto set = [&](int64_t e) { return plan.shared ? 0 : e / (plan.channels * plan.positions); };
    if (random.chance(0.2)) {  // a channel without energy
        int64_t silent = random.below(plan.channels);
        for (int64_t e = 0; e < n; ++e)
            if (channel(e) == silent) x.set(e, 0);
    }

    auto forward =
        function<int32_t(const NkResponse *, const void *, const void *, const void *, void *, void *)>("nk_response_forward");
    auto backward = function<int32_t(const NkResponse *, const void *, const void *, const void *, const void *, void *, void *, void *)>(
        "nk_response_backward");
    NkResponse lying = plan, empty = plan;
    lying.parts ^= NK_WEIGHT;
    *random.pick({&empty.samples, &empty.channels, &empty.positions}) = 0;
    refused("x is null", NK_NULL, [&] { return forward(&plan, nullptr, weight.data(), bias.data(), y.data(), energy.data()); }, {&y});
    refused("the flags lie", NK_NULL, [&] { return forward(&lying, x.data(), weight.data(), bias.data(), y.data(), energy.data()); }, {&y});
    refused("nothing to do", NK_OK, [&] { return forward(&empty, nullptr, weight.data(), bias.data(), nullptr, nullptr); }, {&y});
    on_any_threads(random, [&] { return forward(&plan, x.data(), weight.data(), bias.data(), y.data(), energy.data()); }, {&y, &energy});
    on_any_threads(random, [&] {
        return backward(&plan, dy.data(), x.data(), weight.data(), energy.data(), dx.data(), dweight.data(), dbias.data());
    }, {&dx, &dweight, &dbias});

    const double loose = looseness(plan.type), many = double(plan.channels);
    std::vector<double> g(sets * plan.channels, 0), product(g), size(g), divisor(sets, plan.eps), common(sets, 0), typical(sets, 0);
    std::vector<double> dw(plan.channels, 0), size_w(dw), db(dw), size_b(dw);
    for (int64_t e = 0; e < n; ++e) {
        int64_t at = set(e) * plan.channels + channel(e);
        g[at] += x[e] * x[e];
        product[at] += dy[e] * x[e], size[at] += std::fabs(dy[e] * x[e]);
        db[channel(e)] += dy[e], size_b[channel(e)] += std::fabs(dy[e]);
    }
    auto scale = [&](int64_t c) { return weight ? weight[c] : 1.0; };
    for (std::size_t at = 0; at < g.size(); ++at) {
        g[at] = std::sqrt(g[at]);
        divisor[int64_t(at) / plan.channels] += g[at] / many;
        expect("energy", energy, int64_t(at), g[at], g[at], loose);
    }
    for (int64_t at = 0; at < int64_t(g.size()); ++at) {
        int64_t s = at / plan.channels, c = at % plan.channels;
        double share = g[at] / divisor[s];
        dw[c] += product[at] * share, size_w[c] += size[at] * share;
        common[s] += scale(c) * product[at] * share / many, typical[s] += std::fabs(scale(c)) * size[at] * share / many;
    }
    for (int64_t e = 0; e < n; ++e) {
        int64_t s = set(e), c = channel(e), at = s * plan.channels + c;
        double share = g[at] / divisor[s], shift = bias ? bias[c] : 0;
        double gain = 1 + scale(c) * share, size_gain = 1 + std::fabs(scale(c)) * share;
        expect("y", y, e, x[e] * gain + shift, std::fabs(x[e]) * size_gain + std::fabs(shift), loose);
        if (!dx) continue;
        double per = g[at] == 0 ? 0 : x[e] / (divisor[s] * g[at]);
        double want = dy[e] * gain + per * (scale(c) * product[at] - common[s]);
        double magnitude = std::fabs(dy[e]) * size_gain + std::fabs(per) * (std::fabs(scale(c)) * size[at] + typical[s]);
        expect("dx", dx, e, want, magnitude, loose);
    }
    for (int64_t c = 0; c < plan.channels; ++c) {
        if (dweight) expect("dweight", dweight, c, dw[c], size_w[c], loose);
        if (dbias) expect("dbias", dbias, c, db[c], size_b[c], loose);
    }
}

const Fuzzer of_windows{"local response", local};
const Fuzzer of_channels{"global response", global};

}  // namespace
}  // namespace fuzz
