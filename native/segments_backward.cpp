// Backward over sets whose elements lie next to one another: the two sums of a set, then dx while the set is in the cache.
//
// Where the gain is constant along runs, its gradient comes out of the same sums. Where it varies along them, the gradient is gathered next
// to dx: in one partial buffer for each batch of sets, or, in sets too large for that, by going down the sets for a few columns at a time.
#include <limits>
#include <memory>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "segments.h"
#include "threads.h"

namespace nk {
namespace {

constexpr int UNROLL = 4;
constexpr int64_t STRETCH = 1024;  // of gradients behind an activation, in the first cache
constexpr int64_t HELD = 16384;    // up to this size, a set keeps them from the first pass to the second

// Of g (times the gain, where that varies), and of that times x - center.
template <class S> struct Pair {
    S g, gx;
};

// Half-way: sums of a stretch of at most BLOCK elements.
template <class A> struct Sums {
    Vec<A> g[UNROLL] = {}, gx[UNROLL] = {};

    NK_INLINE void add(int u, Vec<A> v, Vec<A> apart) {
        g[u] += v;
        gx[u] += v * apart;
    }
    Pair<double> total() const {
        return {sum_lanes<A>((g[0] + g[1]) + (g[2] + g[3])), sum_lanes<A>((gx[0] + gx[1]) + (gx[2] + gx[3]))};
    }
};

// dx = g * gain * inverse + (x - center) * along + shift.
template <class A> struct Pull {
    A center, inverse, along, shift;
};

// One gain and bias for the whole run: those of a ReLU that follows.
template <class A> struct Gate {
    A scale, bias;
};

template <bool RELU, class A> NK_INLINE Vec<A> gated(Vec<A> g, Vec<A> apart, Gate<A> gate) {
    if constexpr (RELU) return select<A>(apart * splat<A>(gate.scale) + splat<A>(gate.bias) <= 0, Vec<A>{}, g);
    return g;
}

template <bool RELU, class G, class T, class A = accumulator<T>>
NK_INLINE void add_constant(Sums<A> &sums, const G *g, const T *x, int64_t n, A center, Gate<A> gate) {
    Vec<A> c = splat<A>(center);
    auto add = [&](int u, Vec<A> v, Vec<A> apart) { sums.add(u, gated<RELU, A>(v, apart, gate), apart); };
    int64_t i = 0;
    for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
        for (int u = 0; u < UNROLL; ++u) add(u, load(g + i + u * LANES), load(x + i + u * LANES) - c);
    for (; i + LANES <= n; i += LANES) add(0, load(g + i), load(x + i) - c);
    if (End<A> end{n}; end.of(n))
        add(1, select<A>(end.counts(), end.load(g), Vec<A>{}), select<A>(end.counts(), end.load(x) - c, Vec<A>{}));
}

template <class G, class T, class A = accumulator<T>>
NK_INLINE void add_varying(Sums<A> &sums, const G *g, const T *x, const A *gain, int64_t n, A center) {
    Vec<A> c = splat<A>(center);
    int64_t i = 0;
    for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
        for (int u = 0; u < UNROLL; ++u) {
            int64_t j = i + u * LANES;
            sums.add(u, load(g + j) * load(gain + j), load(x + j) - c);
        }
    for (; i + LANES <= n; i += LANES) sums.add(0, load(g + i) * load(gain + i), load(x + i) - c);
    if (End<A> end{n}; end.of(n))
        sums.add(1, select<A>(end.counts(), end.load(g) * end.load(gain), Vec<A>{}), select<A>(end.counts(), end.load(x) - c, Vec<A>{}));
}

// dx of a run of one gain, which is in pull.inverse.
template <bool RELU, bool PULLED, bool DSUM, class G, class T, class A = accumulator<T>>
void pull_constant(const G *g, const T *x, const T *dsum, T *dx, int64_t n, Pull<A> pull, Gate<A> gate) {
    Vec<A> c = splat<A>(pull.center), inverse = splat<A>(pull.inverse), along = splat<A>(pull.along), shift = splat<A>(pull.shift);
    auto pulled = [&](auto &&at) {
        Vec<A> apart{}, v = at(g);
        if constexpr (RELU || PULLED) apart = at(x) - c;
        v = gated<RELU, A>(v, apart, gate) * inverse;
        if constexpr (PULLED) v += apart * along + shift;
        if constexpr (DSUM) v += at(dsum);
        return v;
    };
    End<A> end{n};
    Vec<A> last{};
    if (end.of(n)) last = pulled([&](auto *p) { return end.load(p); });
    int64_t i = 0;
    for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
        for (int u = 0; u < UNROLL; ++u) store(dx + i + u * LANES, pulled([&](auto *p) { return load(p + i + u * LANES); }));
    for (; i + LANES <= n; i += LANES) store(dx + i, pulled([&](auto *p) { return load(p + i); }));
    if (end.of(n)) end.store(dx, last);
}

// dx of a run with a gain of its own for each element, and what the run adds to the gradients of gain and bias. PARAMETERS counts those.
template <int PARAMETERS, bool DX, bool PULLED, bool DSUM, class G, class T, class A = accumulator<T>>
void pull_varying(const G *g, const T *x, const A *gain, const T *dsum, T *dx, A *dgain, A *dbias, int64_t n, Pull<A> pull) {
    Vec<A> c = splat<A>(pull.center), inverse = splat<A>(pull.inverse), along = splat<A>(pull.along), shift = splat<A>(pull.shift);
    struct Element {
        Vec<A> dx, dgain, dbias;
    };
    auto pulled = [&](auto &&at) {
        Element found{};
        Vec<A> apart{}, v = at(g), scaled = v * inverse;
        if constexpr (PULLED || PARAMETERS > 0) apart = at(x) - c;
        if constexpr (DX) {
            found.dx = scaled * at(gain);
            if constexpr (PULLED) found.dx += apart * along + shift;
            if constexpr (DSUM) found.dx += at(dsum);
        }
        if constexpr (PARAMETERS > 0) found.dgain = scaled * apart;
        if constexpr (PARAMETERS > 1) found.dbias = v;
        return found;
    };
    auto put = [&](int64_t i, const Element &found) {
        if constexpr (DX) store(dx + i, found.dx);
        if constexpr (PARAMETERS > 0) store(dgain + i, load(dgain + i) + found.dgain);
        if constexpr (PARAMETERS > 1) store(dbias + i, load(dbias + i) + found.dbias);
    };
    End<A> end{n};
    Element last{};
    if (end.of(n)) last = pulled([&](auto *p) { return end.load(p); });
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int u = 0; u < 2; ++u) put(i + u * LANES, pulled([&](auto *p) { return load(p + i + u * LANES); }));
    for (; i + LANES <= n; i += LANES) put(i, pulled([&](auto *p) { return load(p + i); }));
    if (!end.of(n)) return;
    if constexpr (DX) end.store(dx, last.dx);
    auto gather = [&](A *to, Vec<A> v) { end.store(to, end.load(to) + select<A>(end.counts(), v, Vec<A>{})); };
    if constexpr (PARAMETERS > 0) gather(dgain, last.dgain);
    if constexpr (PARAMETERS > 1) gather(dbias, last.dbias);
}

template <class F> inline void with_flag(bool flag, F &&f) { flag ? f(std::true_type{}) : f(std::false_type{}); }

template <class T> class SegmentsBackward {
    using A = accumulator<T>;
    const NkPlan &plan;
    const Backward<T> &call;
    const Runs runs;
    const bool pulled;  // whether the statistic has a gradient
    const bool curved;  // whether gradients have to be prepared: they pass an activation first
    const bool parameters;
    std::vector<A> ones;  // a gain, where there is a bias along the runs only

  public:
    SegmentsBackward(const NkPlan &plan, const Backward<T> &call)
        : plan(plan), call(call), runs(runs_of(plan, call.weight || call.bias || call.dweight || call.dbias)),
          pulled(!plan.given && (plan.centred || plan.scale != NK_UNSCALED)),
          curved(plan.activation > (runs.vector ? NK_LINEAR : NK_RELU)), parameters(call.dweight || call.dbias) {
        if (runs.vector && !call.weight) ones.assign(runs.length, A(1));
    }

    void run() {
        if (call.dweight) std::fill_n(call.dweight, plan.parameters, A(0));
        if (call.dbias) std::fill_n(call.dbias, plan.parameters, A(0));
        if (runs.size() == 0 || runs.sets == 0) return;
        runs.vector ? run_varying() : run_constant();
    }

  private:
    // ---- What both kinds of parameters share.

    A center(int64_t set) const { return call.center ? call.center[set] : A(0); }
    A inverse(int64_t set) const { return call.inverse ? call.inverse[set] : A(1); }

    // From the sums over a set of g * gain, and of that times x - center.
    Pull<A> pull_of(int64_t set, Pair<double> sums) const {
        Pull<A> pull{center(set), inverse(set), 0, 0};
        if (!pulled) return pull;
        double inverse = pull.inverse, k = strength<A>(plan, pull.inverse);
        if (k != 0) pull.along = A(-k * inverse * inverse * inverse * sums.gx);
        if (plan.centred) pull.shift = A(-inverse * sums.g / double(runs.size()));
        return pull;
    }

    // Gradients behind the activation: dy times its slope.
    void prepare(const Stretch &s, int64_t offset, int64_t n, int64_t set, A *to) const {
        const A *gain = call.weight ? call.weight + s.parameter : nullptr, *bias = call.bias ? call.bias + s.parameter : nullptr;
        A scale = inverse(set), low = 0;
        if (!runs.vector) scale *= gain ? *gain : A(1), low = bias ? -*bias : A(0);
        int64_t step = runs.vector ? offset : 0;
        mapper<A, T, false>(runs.vector && gain, runs.vector && bias)(call.x + s.x + offset, to, n, center(set), scale, low,
                                                               -std::numeric_limits<A>::infinity(), gain + step, bias + step, 0);
        slope_run<A>(plan.activation, to, n);
        const T *dy = call.dy + s.x + offset;
        auto passed = [](Vec<A> slope, Vec<A> g) { return select<A>(slope == 0, Vec<A>{}, slope * g); };
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store(to + i, passed(load(to + i), load(dy + i)));
        if (i < n) store_some(to + i, passed(load_some(to + i, n - i), load_some(dy + i, n - i)), n - i);
    }

    // Where a set's prepared gradients are: all of them, or those of one stretch.
    struct Prepared {
        alignas(64) A values[HELD];
        bool all = false;
    };

    // each(g, offset, n) for the gradients of a stretch.
    template <class Each> void gradients(const Stretch &s, int64_t set, Prepared &prepared, Each &&each) const {
        if (!curved) return each(call.dy + s.x, 0, s.n);
        if (runs.size() <= HELD) {
            if (!prepared.all) prepare(s, 0, s.n, set, prepared.values + s.index);
            return each(static_cast<const A *>(prepared.values + s.index), 0, s.n);
        }
        for (int64_t i = 0; i < s.n; i += STRETCH) {
            int64_t n = std::min(STRETCH, s.n - i);
            prepare(s, i, n, set, prepared.values);
            each(static_cast<const A *>(prepared.values), i, n);
        }
    }

    // ---- One gain for a run.

    // The sums of a chunk lie apart for each run, or, where the runs of all pieces share a gain, for each run of a piece.
    bool shared() const { return runs.far > 1 && runs.per_far == 0; }
    int64_t cells() const { return shared() ? runs.mid : runs.far * runs.mid; }
    int64_t window() const { return shared() ? runs.mid : std::min(cells(), CHUNK / runs.length + 2); }
    int64_t window_begin(int64_t chunk) const { return shared() ? 0 : chunk * CHUNK / runs.length; }

    void run_constant() {
        int64_t chunks = runs.chunks(), sets = runs.sets, width = window();
        std::unique_ptr<Pair<double>[]> parts;
        if (pulled || parameters) parts.reset(new Pair<double>[std::size_t(sets * chunks * width)]);
        auto part = [&](int64_t set, int64_t chunk) { return parts.get() + (set * chunks + chunk) * width; };
        if (chunks > 1 && sets < 4 * threads()) {
            for_each(sets * chunks, [&](int64_t task) {
                Prepared prepared;
                if (parts) sum_constant(task / chunks, task % chunks, part(task / chunks, task % chunks), prepared);
            });
            for_each(call.dx ? sets * chunks : 0, [&](int64_t task) {
                Prepared prepared;
                int64_t set = task / chunks, begin = task % chunks * CHUNK;
                pull_set(set, part(set, 0), begin, std::min(begin + CHUNK, runs.size()), prepared);
            });
        } else {
            int64_t together = std::max<int64_t>(1, CHUNK / runs.size());
            for_each((sets + together - 1) / together, [&](int64_t task) {
                for (int64_t set = task * together, end = std::min(sets, set + together); set < end; ++set) {
                    Prepared prepared;
                    for (int64_t chunk = 0; parts && chunk < chunks; ++chunk) sum_constant(set, chunk, part(set, chunk), prepared);
                    prepared.all = parts && runs.size() <= HELD;
                    if (call.dx) pull_set(set, parts ? part(set, 0) : nullptr, 0, runs.size(), prepared);
                }
            });
        }
        if (parameters) gather_constant(parts.get());
    }

    Gate<A> gate(int64_t set, int64_t parameter) const {
        return {inverse(set) * (call.weight ? call.weight[parameter] : A(1)), call.bias ? call.bias[parameter] : A(0)};
    }

    void sum_constant(int64_t set, int64_t chunk, Pair<double> *part, Prepared &prepared) const {
        std::fill_n(part, window(), Pair<double>{0, 0});
        int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, runs.size()), first = window_begin(chunk);
        Place at = place_of(plan, runs, set);
        A c = center(set);
        for (int64_t from = begin; from < end; from += BLOCK) {
            Sums<A> sums;
            int64_t cell = -1;
            auto settle = [&] {
                auto total = sums.total();
                part[cell].g += total.g, part[cell].gx += total.gx;
            };
            walk(runs, at, from, std::min(from + BLOCK, end), [&](const Stretch &s) {
                int64_t now = (shared() ? s.m : s.f * runs.mid + s.m) - first;
                if (cell >= 0 && now != cell) settle(), sums = {};
                cell = now;
                gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                    const T *x = call.x + s.x + offset;
                    if (plan.activation == NK_RELU) add_constant<true>(sums, g, x, n, c, gate(set, s.parameter));
                    else add_constant<false>(sums, g, x, n, c, Gate<A>{});
                });
            });
            settle();
        }
    }

    // each(parameter, sums) for the sums of a set, in order.
    template <class Each> void each_part(int64_t set, const Pair<double> *parts, Each &&each) const {
        Place at = place_of(plan, runs, set);
        int64_t width = window();
        for (int64_t chunk = 0, chunks = runs.chunks(); chunk < chunks; ++chunk, parts += width)
            for (int64_t i = 0, first = window_begin(chunk), n = std::min(width, cells() - first); i < n; ++i) {
                int64_t f = runs.mid == 1 ? first + i : (first + i) / runs.mid, m = first + i - f * runs.mid;
                each(at.parameter + f * runs.per_far + m * runs.per_mid, parts[i]);
            }
    }

    void pull_set(int64_t set, const Pair<double> *parts, int64_t begin, int64_t end, Prepared &prepared) const {
        Pair<double> sums{0, 0};
        if (pulled)
            each_part(set, parts, [&](int64_t parameter, const Pair<double> &part) {
                double gain = call.weight ? double(call.weight[parameter]) : 1;
                sums.g += gain * part.g, sums.gx += gain * part.gx;
            });
        Pull<A> pull = pull_of(set, sums);
        walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
            Gate<A> at = gate(set, s.parameter);
            Pull<A> mine = pull;
            mine.inverse = at.scale;
            gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                int64_t p = s.x + offset;
                with_flag(pulled, [&](auto PULLED) {
                    with_flag(call.dsum != nullptr, [&](auto DSUM) {
                        auto go = [&](auto RELU) {
                            pull_constant<RELU.value, PULLED.value, DSUM.value>(g, call.x + p, call.dsum + p, call.dx + p, n, mine, at);
                        };
                        plan.activation == NK_RELU ? go(std::true_type{}) : go(std::false_type{});
                    });
                });
            });
        });
    }

    void gather_constant(const Pair<double> *parts) const {
        std::vector<Pair<double>> total(plan.parameters, Pair<double>{0, 0});
        int64_t step = runs.chunks() * window();
        for (int64_t set = 0; set < runs.sets; ++set) {
            double scale = inverse(set);
            each_part(set, parts + set * step, [&](int64_t parameter, const Pair<double> &part) {
                total[parameter].g += part.g, total[parameter].gx += scale * part.gx;
            });
        }
        for (int64_t i = 0; i < plan.parameters; ++i) {
            if (call.dweight) call.dweight[i] = A(total[i].gx);
            if (call.dbias) call.dbias[i] = A(total[i].g);
        }
    }

    // ---- A gain for each element of a run.

    // The sets that share their parameters: those of one outer place, and of one k where that tells them apart.
    struct Groups {
        int64_t divisor, places, ks, rows, count;
        bool by_k;
    };
    Groups groups() const {
        bool one = plan.outer_step == 0 || plan.outer_mod == 1;
        int64_t divisor = one ? plan.outer : plan.outer_div, places = one ? 1 : plan.outer_mod;
        int64_t cycles = (plan.outer + divisor * places - 1) / (divisor * places);
        bool by_k = runs.per_kept != 0;
        return {divisor, places, runs.kept, cycles * divisor * (by_k ? 1 : runs.kept), places * (by_k ? runs.kept : 1), by_k};
    }
    // The row-th set of a group, or -1 where the last cycle ends before it.
    int64_t set_of(const Groups &groups, int64_t group, int64_t row) const {
        int64_t place = groups.by_k ? group / groups.ks : group, k = groups.by_k ? group % groups.ks : row % groups.ks;
        if (!groups.by_k) row /= groups.ks;
        int64_t o = (row / groups.divisor * groups.places + place) * groups.divisor + row % groups.divisor;
        return o < plan.outer ? o * runs.kept + k : -1;
    }

    // The parameters of a group in one buffer: the runs without those that repeat them.
    Runs footprint() const {
        Runs print = runs;
        if (runs.per_far == 0) print.far = 1;
        if (runs.per_mid == 0) print.mid = 1;
        return print;
    }
    static int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

    void run_varying() {
        Groups g = groups();
        Runs print = footprint();
        int64_t size = runs.size();
        // By the shape alone, as the order of the sums depends on it.
        int64_t together = std::min<int64_t>(std::max({(g.rows + 63) / 64, (CHUNK + size - 1) / size, int64_t(8)}), 512);
        int64_t batches = (g.rows + together - 1) / together;
        bool large = size * int64_t(sizeof(T)) > (1 << 19), few = g.count * batches < 8 && g.rows * g.count * size > 8 * CHUNK;
        if (print.size() == size && (large || few)) return run_by_columns(g);

        int64_t width = padded(print.size());
        std::unique_ptr<A[]> parts;
        if (parameters) parts.reset(new A[std::size_t(g.count * batches * 2 * width)]);
        for_each(g.count * batches, [&](int64_t task) {
            int64_t group = task / batches, begin = task % batches * together, end = std::min(begin + together, g.rows);
            A *dgain = parameters ? parts.get() + task * 2 * width : nullptr, *dbias = parameters ? dgain + width : nullptr;
            if (parameters) std::fill_n(dgain, 2 * width, A(0));
            for (int64_t row = begin; row < end; ++row) {
                int64_t set = set_of(g, group, row);
                if (set < 0) continue;
                Prepared prepared;
                Pair<double> sums = sum_varying(set, 0, size, prepared);
                prepared.all = call.dx && pulled && size <= HELD;
                pull_varying_part(set, pull_of(set, sums), 0, size, prepared, [&](const Stretch &s) {
                    int64_t at = ((runs.per_far ? s.f : 0) * print.mid + (runs.per_mid ? s.m : 0)) * runs.length + s.inside;
                    return Pair<A *>{dgain + at, dbias + at};
                });
            }
        });
        if (parameters) gather_varying(g, print, parts.get(), batches, width);
    }

    const A *gain(const Stretch &s) const { return call.weight ? call.weight + s.parameter : ones.data() + s.inside; }

    Pair<double> sum_varying(int64_t set, int64_t begin, int64_t end, Prepared &prepared) const {
        Pair<double> total{0, 0};
        if (!call.dx || !pulled) return total;
        Place at = place_of(plan, runs, set);
        A c = center(set);
        for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
            Pair<double> part{0, 0};
            for (int64_t from = chunk, last = std::min(chunk + CHUNK, end); from < last; from += BLOCK) {
                Sums<A> sums;
                walk(runs, at, from, std::min(from + BLOCK, last), [&](const Stretch &s) {
                    gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                        add_varying(sums, g, call.x + s.x + offset, gain(s) + offset, n, c);
                    });
                });
                auto block = sums.total();
                part.g += block.g, part.gx += block.gx;
            }
            total.g += part.g, total.gx += part.gx;
        }
        return total;
    }

    // `local` says where the gradients of a stretch's parameters are gathered.
    template <class Local>
    void pull_varying_part(int64_t set, Pull<A> pull, int64_t begin, int64_t end, Prepared &prepared, Local &&local) const {
        walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
            gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                int64_t p = s.x + offset;
                auto go = [&](auto PARAMETERS, auto DX, auto PULLED, auto DSUM) {
                    Pair<A *> to = PARAMETERS.value ? local(s) : Pair<A *>{nullptr, nullptr};
                    pull_varying<PARAMETERS.value, DX.value, PULLED.value, DSUM.value>(
                        g, call.x + p, gain(s) + offset, call.dsum + p, call.dx + p, to.g + offset, to.gx + offset, n, pull);
                };
                auto with_parameters = [&](auto... rest) {
                    if (call.dbias) go(std::integral_constant<int, 2>{}, rest...);
                    else if (call.dweight) go(std::integral_constant<int, 1>{}, rest...);
                    else go(std::integral_constant<int, 0>{}, rest...);
                };
                if (!call.dx) return with_parameters(std::false_type{}, std::false_type{}, std::false_type{});
                with_flag(pulled, [&](auto PULLED) {
                    with_flag(call.dsum != nullptr, [&](auto DSUM) { with_parameters(std::true_type{}, PULLED, DSUM); });
                });
            });
        });
    }

    // The batches' partial gradients, added in order.
    void gather_varying(const Groups &g, const Runs &print, const A *parts, int64_t batches, int64_t width) const {
        int64_t stripes = (print.size() + STRETCH - 1) / STRETCH;
        for_each(g.count * stripes, [&](int64_t task) {
            int64_t group = task / stripes, begin = task % stripes * STRETCH, n = std::min(STRETCH, print.size() - begin);
            int64_t set = set_of(g, group, 0);
            if (set < 0) return;
            Place at = place_of(plan, runs, set);
            for (A *to : {call.dweight, call.dbias}) {
                if (!to) continue;
                double total[STRETCH] = {};
                for (int64_t batch = 0; batch < batches; ++batch) {
                    const A *part = parts + ((group * batches + batch) * 2 + (to == call.dbias)) * width + begin;
                    for (int64_t i = 0; i < n; ++i) total[i] += double(part[i]);
                }
                walk(print, at, begin, begin + n, [&](const Stretch &s) {
                    for (int64_t i = 0; i < s.n; ++i) to[s.parameter + i] = A(total[s.index - begin + i]);
                });
            }
        });
    }

    void run_by_columns(const Groups &g) {
        int64_t chunks = runs.chunks(), size = runs.size();
        std::vector<Pair<double>> parts(call.dx && pulled ? runs.sets * chunks : 0);
        for_each(parts.size(), [&](int64_t task) {
            Prepared prepared;
            int64_t begin = task % chunks * CHUNK;
            parts[task] = sum_varying(task / chunks, begin, std::min(begin + CHUNK, size), prepared);
        });
        int64_t stripes = (size + BLOCK - 1) / BLOCK;
        for_each(g.count * stripes, [&](int64_t task) {
            int64_t group = task / stripes, begin = task % stripes * BLOCK, end = std::min(begin + BLOCK, size);
            alignas(64) A dgain[BLOCK] = {}, dbias[BLOCK] = {};
            Prepared prepared;
            for (int64_t row = 0; row < g.rows; ++row) {
                int64_t set = set_of(g, group, row);
                if (set < 0) continue;
                Pair<double> sums{0, 0};
                for (int64_t chunk = 0; !parts.empty() && chunk < chunks; ++chunk)
                    sums.g += parts[set * chunks + chunk].g, sums.gx += parts[set * chunks + chunk].gx;
                pull_varying_part(set, pull_of(set, sums), begin, end, prepared,
                                  [&](const Stretch &s) { return Pair<A *>{dgain + s.index - begin, dbias + s.index - begin}; });
            }
            int64_t set = set_of(g, group, 0);
            if (set < 0 || !parameters) return;
            walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
                if (call.dweight) std::copy_n(dgain + s.index - begin, s.n, call.dweight + s.parameter);
                if (call.dbias) std::copy_n(dbias + s.index - begin, s.n, call.dbias + s.parameter);
            });
        });
    }
};

}  // namespace

template <class T> void segments_backward(const NkPlan &plan, const Backward<T> &call) { SegmentsBackward<T>(plan, call).run(); }

template void segments_backward<float>(const NkPlan &, const Backward<float> &);
template void segments_backward<double>(const NkPlan &, const Backward<double> &);
template void segments_backward<bfloat16>(const NkPlan &, const Backward<bfloat16> &);
template void segments_backward<float16>(const NkPlan &, const Backward<float16> &);

int64_t segments_scratch(const NkPlan &, bool) { return 0; }

}  // namespace nk
