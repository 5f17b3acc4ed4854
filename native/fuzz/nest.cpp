// The loop nest of a rule, forward and backward, against its definition in plain loops.
#include <algorithm>

#include "fuzz.h"

namespace fuzz {
namespace {

using Forward = int32_t(const NkPlan *, const void *, const void *, const void *, const void *, void *, void *, void *, void *, void *);
using Backward = int32_t(const NkPlan *, const void *, const void *, const void *, const void *, const void *, const void *, const void *,
                         void *, void *, void *);

int64_t elements(const NkPlan &plan) { return plan.outer * plan.far * plan.kept * plan.mid * plan.inner; }
int64_t statistics(const NkPlan &plan) { return plan.outer * plan.kept; }
int64_t set_size(const NkPlan &plan) { return plan.far * plan.mid * plan.inner; }

// visit(element, statistic, parameter) for every element.
template <class Visit> void each(const NkPlan &plan, Visit &&visit) {
    int64_t e = 0;
    for (int64_t o = 0; o < plan.outer; ++o)
        for (int64_t f = 0; f < plan.far; ++f)
            for (int64_t k = 0; k < plan.kept; ++k)
                for (int64_t m = 0; m < plan.mid; ++m)
                    for (int64_t i = 0; i < plan.inner; ++i)
                        visit(e++, o * plan.kept + k,
                              o / plan.outer_div % plan.outer_mod * plan.outer_step + f * plan.per_far + k * plan.per_kept +
                                  m * plan.per_mid + i * plan.per_inner);
}

int64_t length(Random &random, int64_t most) {
    int64_t n = random.chance(0.3) ? 1 : random.chance(0.1) ? 1 + random.below(3000) : 1 + random.below(random.pick({4, 20, 70}));
    return std::max<int64_t>(1, std::min(n, most));
}

NkPlan random_plan(Random &random) {
    NkPlan plan{};
    int64_t room = random.chance(0.1) ? 60000 : 4000;
    int64_t *sizes[] = {&plan.inner, &plan.mid, &plan.kept, &plan.far, &plan.outer};
    std::shuffle(std::begin(sizes), std::end(sizes), random.engine);  // each may be the one that gets the room
    for (int64_t *size : sizes) room /= *size = length(random, room);
    if (plan.far == 1) plan.outer *= plan.kept, plan.kept = 1;

    // Parameters lie in the order of the axes that they vary along.
    int64_t size = 1;
    auto varies = [&](int64_t axis) {
        int64_t step = size;
        size *= axis;
        return step;
    };
    bool along_inner = random.chance(0.4), along_mid = !along_inner && random.chance(0.4);
    if (along_inner) plan.per_inner = varies(plan.inner);
    if (along_mid) plan.per_mid = varies(plan.mid);
    bool in_column = plan.far > 1 && plan.mid * plan.inner == 1;
    if (random.chance(0.5) && !(in_column && size > 1)) plan.per_kept = varies(plan.kept);
    if (random.chance(0.3)) plan.per_far = varies(plan.far);
    plan.outer_div = plan.outer_mod = 1;
    if (random.chance(0.4)) {
        plan.outer_div = 1 + random.below(std::min<int64_t>(plan.outer, 5));
        plan.outer_mod = 1 + random.below(std::max<int64_t>(1, plan.outer / plan.outer_div));
        plan.outer_step = varies(plan.outer_mod);
    }
    plan.parameters = size;

    plan.type = int32_t(random.below(4));
    do plan.parameter_type = int32_t(random.below(4));
    while (plan.parameter_type == NK_FLOAT64 && plan.type != NK_FLOAT64);
    plan.scale = int32_t(random.below(3));
    plan.centred = plan.scale == NK_UNSCALED || (plan.scale == NK_MEAN_SQUARE && random.chance(0.6));
    plan.guard = int32_t(random.below(3));
    plan.eps = random.pick({1e-5, 1e-3, 0.1});
    plan.correction = plan.centred && plan.scale != NK_UNSCALED && set_size(plan) > 1 ? int32_t(random.below(2)) : 0;
    plan.offset = random.chance(0.3) ? 1 : 0;
    plan.activation = random.chance(0.4) ? int32_t(random.below(6)) : NK_LINEAR;
    plan.given = random.chance(0.15);
    plan.stream = random.chance(0.2);
    return plan;
}

double activate(int32_t kind, double z) {
    switch (kind) {
        case NK_RELU: return z < 0 ? 0 : z;
        case NK_SILU: return z / (1 + std::exp(-z));
        case NK_GELU: return 0.5 * z * std::erfc(-z * M_SQRT1_2);
        case NK_GELU_TANH: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
        case NK_LEAKY_RELU: return z < 0 ? 0.01 * z : z;
        default: return z;
    }
}

double slope(int32_t kind, double z) {
    switch (kind) {
        case NK_RELU: return z > 0;
        case NK_SILU: {
            double s = 1 / (1 + std::exp(-z));
            return s * (1 + z * (1 - s));
        }
        case NK_GELU: return 0.5 * std::erfc(-z * M_SQRT1_2) + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI);
        case NK_GELU_TANH: {
            double c = std::sqrt(2 / M_PI), t = std::tanh(c * (z + 0.044715 * z * z * z));
            return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
        }
        case NK_LEAKY_RELU: return z > 0 ? 1 : 0.01;
        default: return 1;
    }
}

double inverse_of(const NkPlan &plan, double square) {
    if (plan.scale == NK_UNSCALED) return 1;
    double found = plan.scale == NK_MEAN_SQUARE ? square / double(set_size(plan) - plan.correction) : square;
    if (plan.guard == NK_INSIDE) return 1 / std::sqrt(found + plan.eps);
    double root = std::sqrt(found);
    return 1 / (plan.guard == NK_OUTSIDE ? root + plan.eps : root < plan.eps ? plan.eps : root);
}

// How far the gradient through the statistic counts, by the inverse that the backward pass is given.
double strength(const NkPlan &plan, double inverse) {
    if (plan.given || plan.scale == NK_UNSCALED) return 0;
    double k = plan.scale == NK_MEAN_SQUARE ? 1 / double(set_size(plan) - plan.correction) : 1;
    if (plan.guard == NK_FLOOR) {
        bool loose = plan.type == NK_FLOAT64 ? inverse < 1 / plan.eps : float(inverse) < 1 / float(plan.eps);
        return loose ? k : 0;
    }
    double rest = plan.guard == NK_OUTSIDE ? 1 - plan.eps * inverse : 1;
    return rest > 0 ? k / rest : 0;
}

std::string show(const NkPlan &plan) {
    std::ostringstream said;
    said << plan.outer << 'x' << plan.far << 'x' << plan.kept << 'x' << plan.mid << 'x' << plan.inner << ", parameters at o/" << plan.outer_div
         << '%' << plan.outer_mod << '*' << plan.outer_step << " f" << plan.per_far << " k" << plan.per_kept << " m" << plan.per_mid << " i"
         << plan.per_inner << " of " << plan.parameters << ", type " << plan.type << '/' << plan.parameter_type << ", centred " << plan.centred
         << ", scale " << plan.scale << ", guard " << plan.guard << ", correction " << plan.correction << ", eps " << plan.eps << ", offset "
         << plan.offset << ", activation " << plan.activation << ", given " << plan.given << ", stream " << plan.stream;
    return said.str();
}

struct Case {
    NkPlan plan;
    int64_t n, sets;
    Buffer x, residual, weight, bias, y;
    Buffer center, inverse, variance;
    double loose;
    bool poisoned;  // one input is NaN

    double gain(int64_t p) const { return weight ? plan.offset + weight[p] : 1; }
    double shift(int64_t p) const { return bias ? bias[p] : 0; }
};

// Rows as whole numbers, against y.
void check_quantized(Random &random, Case &c) {
    const NkPlan &plan = c.plan;
    int64_t d = set_size(plan);
    std::vector<int8_t> q(c.n);
    Buffer scale(NK_FLOAT32, c.sets);
    auto quantize = function<int32_t(const NkPlan *, const void *, const void *, const void *, void *, void *)>("nk_quantize");
    on_any_threads(random, [&] { return quantize(&plan, c.x.data(), c.weight.data(), c.bias.data(), q.data(), scale.data()); }, {&scale});
    for (int64_t s = 0; s < c.sets; ++s) {
        double most = 0;
        for (int64_t i = 0; i < d; ++i) most = std::isfinite(c.y[s * d + i]) ? std::max(most, std::fabs(c.y[s * d + i])) : NAN;
        expect("scale", scale, s, most / 127, most, 1e-6);
        for (int64_t i = 0; i < d && most > 1e-30; ++i)
            if (std::fabs(double(q[s * d + i]) - c.y[s * d + i] * 127 / most) > 0.5 + 1e-3) throw Mismatch("q is not y");
    }
}

// Returns what was normalized: x, or its sum with the residual.
Buffer check_forward(Random &random, Case &c) {
    const NkPlan &plan = c.plan;
    Buffer &y = c.y = Buffer(plan.type, c.n), sum = c.residual ? Buffer(plan.type, c.n) : Buffer(), x = c.x;
    auto forward = function<Forward>("nk_forward");
    std::vector<Buffer *> outputs{&y, &sum, &c.variance};
    if (!plan.given) outputs.insert(outputs.end(), {&c.center, &c.inverse});
    on_any_threads(random, [&] {
        return forward(&plan, c.x.data(), c.residual.data(), c.weight.data(), c.bias.data(), y.data(), sum.data(), c.center.data(),
                       c.inverse.data(), c.variance.data());
    }, outputs);
    if (!(c.x == x)) throw Mismatch("the input was written to");

    if (!plan.given && random.chance(0.2)) {  // nothing is recorded
        Buffer alone(plan.type, c.n);
        answers([&] {
            return forward(&plan, c.x.data(), c.residual.data(), c.weight.data(), c.bias.data(), alone.data(), sum.data(), nullptr, nullptr,
                           nullptr);
        });
        if (!(alone == y)) throw Mismatch("y depends on whether statistics are kept");
    }

    if (c.variance && !c.residual) {
        Buffer center = c.center, inverse = c.inverse, variance = c.variance;
        auto measure = function<int32_t(const NkPlan *, const void *, void *, void *, void *)>("nk_measure");
        on_any_threads(random, [&] { return measure(&plan, c.x.data(), c.center.data(), c.inverse.data(), c.variance.data()); },
                       {&c.center, &c.inverse, &c.variance});
        if (!(center == c.center && inverse == c.inverse && variance == c.variance)) throw Mismatch("statistics depend on whether y is wanted");
    }

    if (c.residual)
        for (int64_t e = 0; e < c.n; ++e) expect("sum", sum, e, c.x[e] + c.residual[e], 0, 0);
    const Buffer &v = c.residual ? sum : c.x;

    std::vector<double> mean(c.sets, 0), square(c.sets, 0), size(c.sets, 0);
    if (plan.centred) each(plan, [&](int64_t e, int64_t s, int64_t) { mean[s] += v[e] / double(set_size(plan)); });
    each(plan, [&](int64_t e, int64_t s, int64_t) { square[s] += (v[e] - mean[s]) * (v[e] - mean[s]), size[s] += std::fabs(v[e]); });
    for (int64_t s = 0; s < c.sets && !plan.given; ++s) {
        double inverse = inverse_of(plan, square[s]), typical = size[s] / double(set_size(plan));
        // What cancels in the variance is lost relative to the mean.
        double lost = 1 + typical * inverse;
        expect("inverse", c.inverse, s, inverse, inverse * lost * lost, c.loose);
        if (c.center && plan.centred) expect("center", c.center, s, mean[s], typical, c.loose);
        if (c.variance && plan.centred) {
            double variance = square[s] / double(set_size(plan));
            expect("variance", c.variance, s, variance, variance + std::sqrt(variance) * typical, c.loose);
        }
    }
    each(plan, [&](int64_t e, int64_t s, int64_t p) {
        double center = plan.given ? (c.center ? c.center[s] : 0) : mean[s];
        double inverse = plan.given ? c.inverse[s] : inverse_of(plan, square[s]);
        double z = c.gain(p) * (v[e] - center) * inverse + c.shift(p);
        double around = plan.given ? 0 : size[s] / double(set_size(plan));  // what was added when the mean was rounded
        double typical = (std::fabs(v[e]) + std::fabs(center) + around) * inverse;
        expect("y", y, e, activate(plan.activation, z), std::fabs(c.gain(p)) * typical * (1 + typical) + std::fabs(c.shift(p)), c.loose);
    });
    return v;
}

void check_backward(Random &random, Case &c, Buffer v) {
    const NkPlan &plan = c.plan;
    Buffer dy = Buffer::normal(random, plan.type, c.n), dsum = random.chance(0.3) ? Buffer::normal(random, plan.type, c.n) : Buffer();
    Buffer dx = random.chance(0.9) ? Buffer(plan.type, c.n) : Buffer();
    Buffer dweight = c.weight && random.chance(0.8) ? Buffer(plan.parameter_type, plan.parameters) : Buffer();
    Buffer dbias = c.bias && random.chance(0.8) ? Buffer(plan.parameter_type, plan.parameters) : Buffer();
    Buffer center = plan.centred ? c.center : Buffer();
    auto backward = function<Backward>("nk_backward");
    bool output = plan.parts & NK_OUTPUT;
    on_any_threads(random, [&] {
        return backward(&plan, dy.data(), dsum.data(), output ? c.y.data() : v.data(), c.weight.data(), c.bias.data(), center.data(), c.inverse.data(), dx.data(),
                        dweight.data(), dbias.data());
    }, {&dx, &dweight, &dbias});

    struct Sums {
        double g = 0, gx = 0, size_g = 0, size_gx = 0;
    };
    std::vector<Sums> of(c.sets);
    std::vector<double> weight(plan.parameters, 0), bias(plan.parameters, 0), size_weight(plan.parameters, 0), size_bias(plan.parameters, 0);
    std::vector<double> gradient(c.n), normal(c.n), typical(c.n);
    bool at_the_corner = false;
    each(plan, [&](int64_t e, int64_t s, int64_t p) {
        double middle = center ? center[s] : 0, inverse = c.inverse[s];
        normal[e] = (v[e] - middle) * inverse;
        typical[e] = (std::fabs(v[e]) + std::fabs(middle)) * inverse;
        if (output) {
            double before = c.y[e] < 0 && plan.activation == NK_LEAKY_RELU ? 100 * c.y[e] : c.y[e];
            normal[e] = (before - c.shift(p)) / c.gain(p);
            typical[e] = (std::fabs(before) + std::fabs(c.shift(p))) / std::fabs(c.gain(p));
            at_the_corner |= plan.activation && before == 0;
        }
        double z = c.gain(p) * normal[e] + c.shift(p);
        double blur = c.loose * (std::fabs(c.gain(p)) * typical[e] + std::fabs(c.shift(p)));
        at_the_corner |= (plan.activation == NK_RELU || plan.activation == NK_LEAKY_RELU) && z != 0 && std::fabs(z) < blur;
        double g = dy[e] * slope(plan.activation, z), size = std::fabs(dy[e]) * (1 + (plan.activation ? typical[e] : 0));
        weight[p] += g * normal[e], size_weight[p] += size * typical[e];
        bias[p] += g, size_bias[p] += size;
        gradient[e] = g * c.gain(p), size *= std::fabs(c.gain(p));
        of[s].g += gradient[e], of[s].size_g += size;
        of[s].gx += gradient[e] * normal[e], of[s].size_gx += size * typical[e];
    });
    if (at_the_corner || c.poisoned) return;  // either side of the step is right, and any gradient of NaN
    for (int64_t p = 0; p < plan.parameters; ++p) {
        if (dweight) expect("dweight", dweight, p, weight[p], size_weight[p], c.loose);
        if (dbias) expect("dbias", dbias, p, bias[p], size_bias[p], c.loose);
    }
    if (!dx) return;
    each(plan, [&](int64_t e, int64_t s, int64_t p) {
        double inverse = c.inverse[s], k = strength(plan, inverse), count = double(set_size(plan));
        double through_mean = plan.centred && !plan.given ? of[s].g / count : 0;
        double want = inverse * (gradient[e] - through_mean - k * normal[e] * of[s].gx) + (dsum ? dsum[e] : 0);
        double magnitude = std::fabs(c.gain(p) * dy[e]) * (1 + (plan.activation ? typical[e] : 0)) + of[s].size_g / count +
                           k * (typical[e] + 1) * of[s].size_gx;
        double rest = plan.guard == NK_OUTSIDE && k != 0 ? 1 - plan.eps * inverse : 1;
        expect("dx", dx, e, want, inverse * magnitude / rest + (dsum ? std::fabs(dsum[e]) : 0), c.loose);
    });
}

// Pointers that are null against the flags or without which nothing can be done, empty inputs, and threads that fail.
void check_refusals(Random &random, Case &c) {
    NkPlan plan = c.plan;
    auto forward = function<Forward>("nk_forward");
    auto backward = function<Backward>("nk_backward");
    Buffer y(plan.type, c.n), dx(plan.type, c.n), dweight(plan.parameter_type, plan.parameters), dbias = dweight, dy = c.x;
    void *center = plan.centred ? c.center.data() : nullptr;
    auto run_forward = [&](void *x, void *weight, void *bias, void *to) {
        return forward(&plan, x, nullptr, weight, bias, to, nullptr, c.center.data(), c.inverse.data(), nullptr);
    };
    auto run_backward = [&](void *from, void *x, void *inverse) {
        return backward(&plan, from, nullptr, x, c.weight.data(), c.bias.data(), center, inverse, dx.data(), dweight.data(), dbias.data());
    };
    void *x = c.x.data(), *weight = c.weight.data(), *bias = c.bias.data();
    std::vector<Buffer *> outputs{&y}, gradients{&dx, &dweight, &dbias};
    if (!plan.given) outputs.insert(outputs.end(), {&c.center, &c.inverse});
    refused("x is null", NK_NULL, [&] { return run_forward(nullptr, weight, bias, y.data()); }, outputs);
    refused("y is null", NK_NULL, [&] { return run_forward(x, weight, bias, nullptr); }, outputs);
    refused("dy is null", NK_NULL, [&] { return run_backward(nullptr, x, c.inverse.data()); }, gradients);
    refused("inverse is null", NK_NULL, [&] { return run_backward(dy.data(), x, nullptr); }, gradients);
    plan.parts ^= random.pick({NK_WEIGHT, NK_BIAS});
    refused("the flags lie", NK_NULL, [&] { return run_forward(x, weight, bias, y.data()); }, outputs);
    refused("the flags lie", NK_NULL, [&] { return run_backward(dy.data(), x, c.inverse.data()); }, gradients);
    plan.parts = c.plan.parts;
    plan.type = 4;
    refused("the type is unknown", NK_UNKNOWN_TYPE, [&] { return run_forward(x, weight, bias, y.data()); }, outputs);
    plan.type = c.plan.type;

    use_threads(3, random.pick({AT_ONCE, HALF_WAY}));
    int32_t status = run_forward(x, weight, bias, y.data());
    if (status != NK_OK && status != NK_THREADS_FAILED) throw Mismatch("threads fail: status " + std::to_string(status));
    status = run_backward(dy.data(), x, c.inverse.data());
    if (status != NK_OK && status != NK_THREADS_FAILED) throw Mismatch("threads fail, backward: status " + std::to_string(status));
    use_threads(1);

    *random.pick({&plan.outer, &plan.far, &plan.kept, &plan.mid, &plan.inner}) = 0;
    refused("nothing to do", NK_OK, [&] { return run_forward(nullptr, weight, bias, nullptr); }, outputs);
    answers([&] { return run_backward(nullptr, nullptr, nullptr); });
    for (int64_t p = 0; p < plan.parameters; ++p)
        if (dweight[p] != 0 || dbias[p] != 0) throw Mismatch("the gradient of nothing is not 0");
}

void one_case(Random &random) {
    Case c{};
    c.plan = random_plan(random);
    const NkPlan &plan = c.plan;
    c.n = elements(plan), c.sets = statistics(plan);
    c.loose = plan.type == NK_FLOAT64 ? 1e-13 : 5e-6;
    double shift = random.chance(0.5) ? 0 : 3 * random.normal();
    // Squares beyond the range of float, of numbers that are within it.
    bool extreme = plan.type == NK_FLOAT32 && plan.scale != NK_UNSCALED && !plan.given && set_size(plan) > 1 && random.chance(0.1);
    if (extreme) c.plan.eps = 0, shift = 0;
    c.x = Buffer::normal(random, plan.type, c.n, shift, extreme ? random.pick({1e-23, 1e25}) : 1);
    c.poisoned = !extreme && random.chance(0.05);
    if (c.poisoned) c.x.set(random.below(c.n), NAN);
    if (!plan.given && !extreme && random.chance(0.2)) c.residual = Buffer::normal(random, plan.type, c.n);
    if (random.chance(0.6)) c.weight = Buffer::normal(random, plan.parameter_type, plan.parameters, 1);
    if (random.chance(0.6)) c.bias = Buffer::normal(random, plan.parameter_type, plan.parameters);
    if (!c.weight) c.plan.offset = 0;
    c.plan.parts = (c.weight ? NK_WEIGHT : 0) | (c.bias ? NK_BIAS : 0);
    bool undone = plan.activation == NK_LINEAR || plan.activation == NK_LEAKY_RELU;
    if (undone && !plan.given && random.chance(0.4)) c.plan.parts |= NK_OUTPUT;
    int32_t kept = wide(plan.type);
    c.inverse = Buffer(kept, c.sets);
    if (plan.centred) c.center = Buffer(kept, c.sets);
    if (plan.given) {
        for (int64_t s = 0; s < c.sets; ++s) {
            c.inverse.set(s, plan.scale == NK_UNSCALED ? 1 : std::exp(0.5 * random.normal()));
            if (c.center) c.center.set(s, shift + random.normal());
        }
    } else if (plan.centred && !extreme && random.chance(0.4)) {
        c.variance = Buffer(kept, c.sets);
    }
    try {
        Buffer normalized = check_forward(random, c);
        bool rows = plan.far * plan.kept == 1 && plan.outer_step == 0 && !plan.given && !c.residual;
        if (rows && !extreme) check_quantized(random, c);
        if (!extreme) check_backward(random, c, normalized);  // the gradient's terms leave float's range
        if (random.chance(0.1)) check_refusals(random, c);
    } catch (const Mismatch &mismatch) {
        throw Mismatch(std::string(mismatch.what()) + "\n" + show(plan) + (c.weight ? ", weight" : "") + (c.bias ? ", bias" : "") +
                       (c.residual ? ", residual" : "") + (plan.parts & NK_OUTPUT ? ", from the output" : ""));
    }
}

const Fuzzer entry{"nest", one_case};

}  // namespace
}  // namespace fuzz
