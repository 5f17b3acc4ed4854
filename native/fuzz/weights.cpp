// Weights, any number in one call: forward against the definition in plain loops, backward against its derivative along a random
// direction, by dual numbers.
#include <algorithm>

#include "../weights.h"
#include "fuzz.h"

namespace fuzz {
namespace {

using Weights = int32_t(int64_t, const NkWeightPlan *const *, const NkWeightCall *, int64_t);

// A number and its derivative along the direction.
struct Dual {
    double v = 0, d = 0;
};
Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
Dual operator*(double a, Dual b) { return {a * b.v, a * b.d}; }
Dual operator/(Dual a, Dual b) { return {a.v / b.v, (a.d - a.v / b.v * b.d) / b.v}; }
Dual root(Dual a) { return {std::sqrt(a.v), a.v > 0 ? a.d / (2 * std::sqrt(a.v)) : 0}; }

int64_t elements(const NkWeightPlan &p) { return p.groups * p.far * p.kept * p.inner; }

// The set of an element in either system.
struct Places {
    int64_t near, apart;
};
template <class Visit> void each(const NkWeightPlan &p, Visit &&visit) {
    int64_t e = 0;
    for (int64_t g = 0; g < p.groups; ++g)
        for (int64_t f = 0; f < p.far; ++f)
            for (int64_t k = 0; k < p.kept; ++k)
                for (int64_t i = 0; i < p.inner; ++i) visit(e++, Places{g * p.far + f, g * p.kept + k});
}

using Duals = std::vector<Dual>;

Dual guarded(const NkWeightPlan &p, Dual square) {
    if (p.guard == NK_INSIDE) return root(square + Dual{p.eps, 0});
    Dual size = root(square);
    if (p.guard == NK_OUTSIDE) return size + Dual{p.eps, 0};
    return size.v > p.eps ? size : Dual{p.eps, 0};
}

// Divides each set of one system by its scale; the exponent is 1, or 1/2 for roots.
Duals divided(const NkWeightPlan &p, const Duals &x, const Duals &by, bool near, bool half, std::vector<double> &factors) {
    int64_t sets = near ? p.groups * p.far : p.groups * p.kept;
    double count = double(elements(p) / sets);
    Duals mean(sets), square(sets), y(x.size());
    auto place = [&](Places at) { return near ? at.near : at.apart; };
    if (p.method == NK_NORMALIZE && p.centred) each(p, [&](int64_t e, Places at) { mean[place(at)] = mean[place(at)] + (1 / count) * by[e]; });
    each(p, [&](int64_t e, Places at) {
        Dual d = by[e] - mean[place(at)];
        square[place(at)] = square[place(at)] + d * d;
    });
    bool by_mean = p.method == NK_NORMALIZE && p.scale == NK_MEAN_SQUARE;
    for (Dual &s : square) {
        s = guarded(p, (by_mean ? 1 / (count - p.correction) : 1.0) * s);
        if (half) s = root(s);
        if (p.constant) s.d = 0;
    }
    each(p, [&](int64_t e, Places at) {
        y[e] = (x[e] - mean[place(at)]) / square[place(at)];
        factors[e] /= square[place(at)].v;
    });
    return y;
}

struct Weight {
    NkWeightPlan plan{};
    Buffer x, gain, gradient, y, dx, dgain, left, right, kept;
    Duals want;
    std::vector<double> along_x, along_gain, factors;  // y / x, but for the mean
};

void improve(const NkWeightPlan &p, Weight &w, std::vector<double> &u, std::vector<double> &v) {
    auto step = [&](std::vector<double> &to, bool rows) {
        std::vector<double> product(to.size());
        each(p, [&](int64_t e, Places) {
            int64_t i = e / p.kept, j = e % p.kept;
            product[rows ? i : j] += w.x[e] * (rows ? v[j] : u[i]);
        });
        double size = 0;
        for (double one : product) size += one * one;
        if (std::sqrt(size) > p.eps)
            for (std::size_t i = 0; i < to.size(); ++i) to[i] = product[i] / std::sqrt(size);
    };
    for (int k = 0; k < p.iterations; ++k) step(u, true), step(v, false);
}

// By the vectors that the library ended with, which are those wanted but for rounding.
Duals over_sigma(Weight &w, const Duals &x) {
    Dual sigma;
    const NkWeightPlan &p = w.plan;
    each(p, [&](int64_t e, Places) { sigma = sigma + w.kept[1 + e / p.kept] * w.kept[1 + p.far + e % p.kept] * x[e]; });
    if (std::fabs(sigma.v) <= p.eps) sigma = {p.eps, 0};
    Duals y;
    for (const Dual &one : x) y.push_back(one / sigma);
    std::fill(w.factors.begin(), w.factors.end(), 1 / sigma.v);
    return y;
}

Duals definition(Weight &w) {
    const NkWeightPlan &p = w.plan;
    Duals x(elements(p)), y;
    w.factors.assign(x.size(), p.factor);
    for (std::size_t e = 0; e < x.size(); ++e) x[e] = {w.x[int64_t(e)], w.along_x[e]};
    bool near = p.sets == NK_NEAR;
    if (p.method == NK_SPECTRAL) return over_sigma(w, x);
    if (p.method == NK_RUIZ) {
        y = x;
        for (int k = 0; k < p.iterations; ++k) {
            Duals rows = divided(p, y, y, true, true, w.factors);
            y = divided(p, rows, y, false, true, w.factors);
        }
    } else {
        y = divided(p, x, x, near, false, w.factors);
        if (p.method == NK_SEQUENTIAL) y = divided(p, y, y, !near, false, w.factors);
        if (p.method == NK_SIMULTANEOUS) y = divided(p, y, x, !near, false, w.factors);
    }
    each(p, [&](int64_t e, Places at) {
        int64_t set = near ? at.near : at.apart;
        Dual gain = w.gain ? Dual{w.gain[set], w.along_gain[std::size_t(set)]} : Dual{1, 0};
        y[e] = p.factor * (y[e] * gain);
        w.factors[e] *= gain.v;
    });
    return y;
}

int64_t size(Random &random, int64_t most) {
    return std::min(most, random.chance(0.3) ? 1 : 1 + random.below(random.pick<int64_t>({5, 20, 100, 3000})));
}

Weight random_weight(Random &random) {
    Weight w;
    NkWeightPlan &p = w.plan;
    int64_t room = random.chance(0.05) ? 200000 : 3000;
    int64_t *sizes[] = {&p.inner, &p.kept, &p.far, &p.groups};
    std::shuffle(std::begin(sizes), std::end(sizes), random.engine);
    for (int64_t *one : sizes) room /= *one = size(random, room);
    p.type = random.pick({NK_FLOAT32, NK_FLOAT64, NK_BFLOAT16, NK_FLOAT16});
    p.method = random.pick({NK_NORMALIZE, NK_NORMALIZE, NK_SEQUENTIAL, NK_SIMULTANEOUS, NK_RUIZ, NK_SPECTRAL});
    p.sets = random.pick({NK_NEAR, NK_APART});
    p.eps = random.pick({1e-12, 1e-3, 0.3});
    p.factor = random.pick({1.0, 1.5});
    p.scale = NK_SUM_SQUARE, p.guard = NK_FLOOR;
    if (p.method == NK_NORMALIZE && random.chance(0.5)) {
        int64_t count = elements(p) / (p.sets == NK_NEAR ? p.groups * p.far : p.groups * p.kept);
        p.centred = 1, p.scale = NK_MEAN_SQUARE, p.guard = random.pick({NK_INSIDE, NK_OUTSIDE, NK_FLOOR});
        p.correction = count > 1 && random.chance(0.5);
        p.eps = random.pick({1e-5, 1e-3, 0.3});
    } else {
        p.constant = random.chance(0.2);
    }
    if (p.method == NK_RUIZ) p.iterations = 1 + int32_t(random.below(4));
    if (p.method == NK_SPECTRAL) {
        p.kept *= p.groups * p.inner, p.groups = p.inner = 1, p.factor = 1, p.constant = 0;
        p.iterations = int32_t(random.below(3));
        w.left = Buffer::normal(random, p.type, p.far), w.right = Buffer::normal(random, p.type, p.kept);
        w.kept = Buffer(wide(p.type), 1 + p.far + p.kept);
    }
    int64_t n = elements(p), sets = p.sets == NK_NEAR ? p.groups * p.far : p.groups * p.kept;
    w.x = Buffer::normal(random, p.type, n, random.chance(0.3) ? 2 : 0), w.gradient = Buffer::normal(random, p.type, n);
    w.y = Buffer(p.type, n), w.dx = Buffer(p.type, n);
    if (p.method == NK_NORMALIZE && random.chance(0.4)) w.gain = Buffer::normal(random, p.type, sets, 1), w.dgain = Buffer(p.type, sets);
    p.parts = w.gain ? NK_GAIN : 0;
    for (int64_t e = 0; e < n; ++e) w.along_x.push_back(random.normal());
    for (int64_t s = 0; s < sets; ++s) w.along_gain.push_back(random.normal());
    return w;
}

std::vector<NkWeightCall> calls(std::vector<Weight> &weights, bool backward) {
    std::vector<NkWeightCall> made;
    for (Weight &w : weights)
        made.push_back({w.x.data(), w.gain.data(), backward ? w.gradient.data() : nullptr, backward ? w.dx.data() : w.y.data(),
                        backward ? w.dgain.data() : nullptr, w.left.data(), w.right.data(), w.kept.data()});
    return made;
}

// The last weight's pointers or flags are wrong: none is touched. An empty one needs no pointers.
void check_refusals(Random &random, std::vector<Weight> &weights, std::vector<const NkWeightPlan *> plans, bool backward) {
    auto pointers = calls(weights, backward);
    std::vector<Buffer *> outputs;
    for (Weight &w : weights) outputs.insert(outputs.end(), {&w.y, &w.dx, &w.dgain, &w.left, &w.right, &w.kept});
    auto many = [&] { return function<Weights>("nk_weights")(int64_t(plans.size()), plans.data(), pointers.data(), backward); };
    NkWeightCall whole = pointers.back();
    (random.chance(0.5) ? pointers.back().weight : backward ? pointers.back().gradient : *(const void **)&pointers.back().result) = nullptr;
    refused("a pointer is null", NK_NULL, many, outputs);
    pointers.back() = whole;
    NkWeightPlan plan = *plans.back();
    plan.parts ^= NK_GAIN, plans.back() = &plan;
    refused("the flags lie", NK_NULL, many, outputs);
    plan.parts = 0, plan.inner = 0, plan.kept = 0;
    plans = {&plan}, pointers = {NkWeightCall{}};
    refused("nothing to do", NK_OK, many, outputs);
}

void run(Random &random, std::vector<Weight> &weights, bool backward) {
    std::vector<const NkWeightPlan *> plans;
    for (Weight &w : weights) plans.push_back(&w.plan);
    use_threads(random.pick({1, 2, 5}));
    auto pointers = calls(weights, backward);
    if (random.chance(0.1)) check_refusals(random, weights, plans, backward);
    int32_t status = function<Weights>("nk_weights")(int64_t(plans.size()), plans.data(), pointers.data(), backward);
    if (status != 0) throw Mismatch("nk_weights answered " + std::to_string(status));
}

void check_vectors(Weight &w, std::vector<double> u, std::vector<double> v, double loose) {
    improve(w.plan, w, u, v);
    for (int64_t i = 0; i < w.plan.far; ++i) expect("left", w.left, i, u[i], 1, loose);
    for (int64_t j = 0; j < w.plan.kept; ++j) expect("right", w.right, j, v[j], 1, loose);
}

void check(Weight &w, double loose) {
    const NkWeightPlan &p = w.plan;
    double largest = 0, slope = 0, want = 0, magnitude = 0;
    for (const Dual &one : w.want) largest = std::max(largest, std::fabs(one.v));
    for (int64_t e = 0; e < elements(p); ++e) {
        double beside = p.centred ? std::fabs(w.factors[e]) * 3 : 0;
        expect("y", w.y, e, w.want[e].v, largest + beside, loose);
        slope += w.dx[e] * w.along_x[e];
        want += w.gradient[e] * w.want[e].d;
        double terms = (std::fabs(w.dx[e]) + 4 * std::fabs(w.factors[e]) * (1 + std::fabs(w.gradient[e]))) * std::fabs(w.along_x[e]);
        magnitude += terms * (loose + rounding(p.type)) + (p.type == NK_FLOAT16 ? 0x1p-24 : 0);
        if (p.type == NK_FLOAT16 && std::fabs(w.factors[e]) > 1000) return;  // leaves the type's range
    }
    for (int64_t s = 0; s < w.dgain.size(); ++s) {
        slope += w.dgain[s] * w.along_gain[s];
        magnitude += 4 * std::fabs(w.dgain[s] * w.along_gain[s]) * rounding(p.type);
    }
    if (w.dgain)
        for (int64_t e = 0; e < elements(p); ++e) magnitude += loose * std::fabs(w.gradient[e] * w.want[e].v) * 4;
    if (std::fabs(slope - want) <= magnitude) return;
    throw Mismatch("the gradient along a direction is " + std::to_string(slope) + ", wanted " + std::to_string(want) + " within " +
                   std::to_string(magnitude));
}

void one_case(Random &random) {
    std::vector<Weight> weights;
    for (int64_t i = 0; i <= random.below(4); ++i) weights.push_back(random_weight(random));
    std::vector<std::vector<double>> vectors;
    for (Weight &w : weights)
        for (Buffer *b : {&w.left, &w.right}) {
            vectors.emplace_back();
            for (int64_t i = 0; i < b->size(); ++i) vectors.back().push_back((*b)[i]);
        }
    run(random, weights, false);
    run(random, weights, true);
    for (std::size_t i = 0; i < weights.size(); ++i) {
        Weight &w = weights[i];
        const NkWeightPlan &p = w.plan;
        double loose = (p.type == NK_FLOAT64 ? 1e-12 : 1e-5) * (1 + p.iterations);
        w.want = definition(w);
        try {
            if (p.method == NK_SPECTRAL) check_vectors(w, vectors[2 * i], vectors[2 * i + 1], 10 * loose);
            check(w, loose);
        } catch (const Mismatch &mismatch) {
            std::ostringstream said;
            said << mismatch.what() << "\nweight " << i << " of " << weights.size() << ": " << p.groups << " x " << p.far << " x " << p.kept
                 << " x " << p.inner << ", type " << p.type << ", method " << p.method << ", sets " << p.sets << ", centred " << p.centred
                 << ", guard " << p.guard << ", eps " << p.eps << ", constant " << p.constant << ", iterations " << p.iterations
                 << (w.gain ? ", gain" : "");
            throw Mismatch(said.str());
        }
    }
}

const Fuzzer entry{"weights", one_case};

}  // namespace
}  // namespace fuzz
