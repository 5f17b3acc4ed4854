// Backward over sets whose elements lie next to one another: the two sums of a set, then dx while the set is in the cache.
//
// Where the gain is constant along runs, its gradient comes out of the same sums. Where it varies along them, the gradient is gathered next
// to dx: in one partial buffer for each batch of sets, or, in sets too large for that, by going down the sets for a few columns at a time.
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "segments.h"
#include "threads.h"

namespace nk {
namespace {

constexpr int64_t STRETCH = 1024;  // of gradients behind an activation, in the first cache
constexpr int64_t HELD = 16384;    // up to this size, a set keeps them from the first pass to the second

// Of g (times the gain, where that varies), and of that times x - center.
template <class S> struct Pair {
    S g, gx;

    Pair &operator+=(const Pair &other) {
        g += other.g;
        gx += other.gx;
        return *this;
    }
};

// Half-way: sums of a stretch of at most BLOCK elements.
template <class A> struct Sums {
    Vec<A> g[4] = {}, gx[4] = {};

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

template <bool RELU, class V, class A> NK_INLINE V gated(const V &g, const V &apart, Gate<A> gate) {
    if constexpr (RELU) return where_positive(apart * splat<A>(gate.scale) + splat<A>(gate.bias), g);
    else return g;
}

// Adds a run: terms(at) gives what is summed and what it is weighted with, from elements that lie as those of at(p).
template <class T, class A, class Terms> NK_INLINE void add_run(Sums<A> &sums, int64_t n, Terms &&terms) {
    auto add_twin = [&](int u, int64_t i) {
        auto [g, apart] = terms([&](auto *p) { return load_twin<T>(p + i); });
        sums.add(u, g.a, apart.a);
        sums.add(u + 1, g.b, apart.b);
    };
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        add_twin(0, i);
        add_twin(2, i + 2 * LANES);
    }
    for (; i + LANES <= n; i += LANES) {
        auto [g, apart] = terms([&](auto *p) { return load(p + i); });
        sums.add(0, g, apart);
    }
    if (End<A> end{n}; end.of(n)) {
        auto [g, apart] = terms([&](auto *p) { return end.load(p); });
        sums.add(1, select<A>(end.counts(), g, Vec<A>{}), select<A>(end.counts(), apart, Vec<A>{}));
    }
}

template <bool RELU, class G, class T, class A = accumulator<T>>
NK_INLINE void add_constant(Sums<A> &sums, const G *g, const T *x, int64_t n, A center, Gate<A> gate) {
    Vec<A> c = splat<A>(center);
    add_run<T>(sums, n, [&](auto &&at) {
        auto apart = at(x) - c;
        return std::pair(gated<RELU>(at(g), apart, gate), apart);
    });
}

template <class G, class T, class A = accumulator<T>>
NK_INLINE void add_varying(Sums<A> &sums, const G *g, const T *x, const A *gain, int64_t n, A center) {
    Vec<A> c = splat<A>(center);
    add_run<T>(sums, n, [&](auto &&at) { return std::pair(at(g) * at(gain), at(x) - c); });
}

// The sums of a stretch, in blocks.
template <bool RELU, class G, class T, class A = accumulator<T>>
NK_INLINE Pair<double> sum_constant(const G *g, const T *x, int64_t n, A center, Gate<A> gate) {
    Pair<double> total{0, 0};
    for (int64_t i = 0; i < n; i += BLOCK) {
        Sums<A> sums;
        add_constant<RELU>(sums, g + i, x + i, std::min(BLOCK, n - i), center, gate);
        total += sums.total();
    }
    return total;
}

// dx of a run of one gain, which is in pull.inverse.
template <bool RELU, bool PULLED, class G, class T, class A = accumulator<T>>
void pull_constant(const G *g, const T *x, const T *dsum, T *dx, int64_t n, Pull<A> pull, Gate<A> gate, int64_t ahead, bool streamed) {
    Vec<A> c = splat<A>(pull.center), inverse = splat<A>(pull.inverse), along = splat<A>(pull.along), shift = splat<A>(pull.shift);
    auto value = [&](auto &&at) {
        auto v = at(g), apart = v;
        if constexpr (RELU || PULLED) apart = at(x) - c;
        v = gated<RELU>(v, apart, gate) * inverse;
        if constexpr (PULLED) v = v + (apart * along + shift);
        if (dsum) v = v + at(dsum);
        return v;
    };
    auto ask = [&](int64_t i) NK_ASK {
        if (!ahead) return;
        fetch<4 * LANES>(g + i + ahead);
        if constexpr (RELU || PULLED) fetch<4 * LANES>(x + i + ahead);
    };
    streamed ? fill_far<T>(dx, n, value, ask) : fill<T>(dx, n, value, ask);
}

// A set whose parameters vary along its runs, beside another that shares them: where it is from the first of both.
template <class A> struct Row {
    int64_t x;
    Pull<A> pull;
};

template <class G, class T, class A = accumulator<T>> struct Varying {
    const G *g;
    const T *x, *dsum;
    T *dx;
    const A *gain;
    A *dgain, *dbias;
    int64_t ahead;
    bool streamed;
};

// dx of a run in one set or in two, and what they add to the gradients of gain and bias, which are read and written once for both. Two go
// faster in the cache; beyond it, one with the next ones fetched does. Gain and gradients are arranged as T wants them.
template <int ROWS, int PARAMETERS, bool DX, bool PULLED, class G, class T, class A = accumulator<T>>
void pull_varying(Varying<G, T> to, const Row<A> *sets, int64_t n) {
    Row<A> rows[ROWS];
    std::copy_n(sets, ROWS, rows);
    struct Element {
        Vec<A> g, dgain, dx;
    };
    auto pulled = [&](const Row<A> &row, Vec<A> gain, auto &&at) {
        Element e{at(to.g + row.x), {}, {}};
        Vec<A> scaled = e.g * splat<A>(row.pull.inverse), apart{};
        if constexpr (PULLED || PARAMETERS > 0) apart = at(to.x + row.x) - splat<A>(row.pull.center);
        if constexpr (PARAMETERS > 0) e.dgain = scaled * apart;
        if constexpr (DX) {
            e.dx = scaled * gain;
            if constexpr (PULLED) e.dx += apart * splat<A>(row.pull.along) + splat<A>(row.pull.shift);
            if (ROWS == 1 && to.dsum) e.dx += at(to.dsum);
        }
        return e;
    };
    // All is read before anything is written: sets may lie a multiple of the page apart, and then a load seems to want the last store.
    auto vectors = [&](int64_t i, auto &&at, Vec<A> *dx) {
        Element e[ROWS];
        for (int r = 0; r < ROWS; ++r) e[r] = pulled(rows[r], load(to.gain + i), at);
        for (int r = 1; r < ROWS; ++r) e[0].g += e[r].g, e[0].dgain += e[r].dgain;
        if constexpr (PARAMETERS > 0) store(to.dgain + i, load(to.dgain + i) + e[0].dgain);
        if constexpr (PARAMETERS > 1) store(to.dbias + i, load(to.dbias + i) + e[0].g);
        for (int r = 0; r < ROWS; ++r) dx[r] = e[r].dx;
    };
    auto twins = [&](int64_t i, auto STREAM) {
        Vec<A> a[ROWS], b[ROWS];
        vectors(i, [&](auto *p) { return load_half<T, 0>(p + i); }, a);
        vectors(i + LANES, [&](auto *p) { return load_half<T, 1>(p + i); }, b);
        if constexpr (DX)
            for (int r = 0; r < ROWS; ++r) {
                T *out = to.dx + rows[r].x + i;
                STREAM.value ? stream_twin<T>(out, {a[r], b[r]}) : store_twin<T>(out, Twin<A>{a[r], b[r]});
            }
    };
    constexpr int64_t line = std::max<int64_t>(LINE / int64_t(sizeof(T)), 2 * LANES);
    int64_t i = 0;
    if constexpr (ROWS == 1 && DX)
        for (; to.streamed && i + line <= n; i += line) {
            if (to.ahead) fetch<line>(to.g + i + to.ahead), fetch<line>(to.x + i + to.ahead);
            for (int64_t j = i; j < i + line; j += 2 * LANES) twins(j, std::true_type{});
        }
    for (; i + 2 * LANES <= n; i += 2 * LANES) twins(i, std::false_type{});
    for (; i < n; i += LANES) {
        int64_t m = std::min<int64_t>(LANES, n - i);
        Mask<A> counts = first<A>(m);
        for (const Row<A> &row : rows) {
            Element e = pulled(row, load_some(to.gain + i, m), [&](auto *p) { return load_some(p + i, m); });
            auto gather = [&](A *sums, Vec<A> v) { store_some(sums + i, load_some(sums + i, m) + select<A>(counts, v, Vec<A>{}), m); };
            if constexpr (DX) store_some(to.dx + row.x + i, e.dx, m);
            if constexpr (PARAMETERS > 0) gather(to.dgain, e.dgain);
            if constexpr (PARAMETERS > 1) gather(to.dbias, e.g);
        }
    }
}

template <class F> inline void with_flag(bool flag, F &&f) { flag ? f(std::true_type{}) : f(std::false_type{}); }

template <class T> class SegmentsBackward {
    using A = accumulator<T>;
    const NkPlan &plan;
    Backward<T> call;
    std::vector<A> own_weight, own_bias;
    const Runs runs;
    const bool pulled;  // whether the statistic has a gradient
    const bool curved;  // whether gradients have to be prepared: they pass an activation first
    const bool parameters;
    const bool streamed;
    std::vector<A> ones;  // a gain, where there is a bias along the runs only

  public:
    SegmentsBackward(const NkPlan &plan, const Backward<T> &call)
        : plan(plan),
          call(call),
          runs(runs_of(plan, call.weight || call.bias || call.dweight || call.dbias)),
          pulled(!plan.given && (plan.centred || plan.scale != NK_UNSCALED)),
          curved(plan.activation > (runs.vector ? NK_LINEAR : NK_RELU)),
          parameters(call.dweight || call.dbias),
          streamed(streams()) {
        this->call.weight = calm<T>(call.weight, plan.parameters, own_weight);
        this->call.bias = calm<T>(call.bias, plan.parameters, own_bias);
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

    bool streams() const {
        int64_t bytes = runs.length * int64_t(sizeof(T));
        if (!plan.stream || !on_element(call.dx)) return false;
        return runs.vector ? bytes % LINE == 0 && until_line(call.dx) == 0 : bytes >= 8 * LINE && !curved;
    }

    A center(int64_t set) const { return call.center ? calm(call.center[set]) : A(0); }
    A inverse(int64_t set) const { return call.inverse ? calm(call.inverse[set]) : A(1); }

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
        const A *gain = along(call.weight, s.parameter), *bias = along(call.bias, s.parameter);
        A scale = inverse(set), low = 0;
        if (!runs.vector) scale *= gain ? *gain : A(1), low = bias ? -*bias : A(0);
        int64_t step = runs.vector ? offset : 0;
        A least = -std::numeric_limits<A>::infinity();
        auto map = mapper<A, T, false>(runs.vector && gain, runs.vector && bias);
        map(call.x + s.x + offset, to, n, center(set), scale, low, least, along(gain, step), along(bias, step), 0);
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
    int64_t window() const { return shared() ? runs.mid : std::min(runs.far * runs.mid, CHUNK / runs.length + 2); }
    int64_t first_cell(int64_t chunk) const { return shared() || chunk == 0 ? 0 : chunk * CHUNK / runs.length; }
    int64_t end_of(int64_t chunk) const { return std::min((chunk + 1) * CHUNK, runs.size()); }

    void run_constant() {
        int64_t chunks = runs.chunks(), sets = runs.sets, width = window();
        std::unique_ptr<Pair<double>[]> parts;
        if (pulled || parameters) parts.reset(new Pair<double>[std::size_t(sets * chunks * width)]);
        auto part = [&](int64_t set, int64_t chunk) { return parts.get() + (set * chunks + chunk) * width; };
        if (chunks > 1 && sets < 4 * threads()) {
            for_each(parts ? sets * chunks : 0, [&](int64_t task) {
                Prepared prepared;
                sum_set(task / chunks, task % chunks, part(task / chunks, task % chunks), prepared);
            });
            for_each(call.dx ? sets * chunks : 0, [&](int64_t task) {
                Prepared prepared;
                int64_t set = task / chunks, chunk = task % chunks;
                pull_set(set, pull_of_parts(set, part(set, 0)), chunk * CHUNK, end_of(chunk), prepared);
                if (streamed) end_of_stream();
            });
        } else {
            // From the sums to the pull it is a long way of short steps: those of a few small sets overlap.
            constexpr int64_t most = 8;
            int64_t few = curved || runs.size() * int64_t(sizeof(T)) > 2048 ? 1 : most;
            int64_t together = std::max<int64_t>(1, CHUNK / (runs.size() * few)) * few;
            for_each((sets + together - 1) / together, [&](int64_t task) {
                Prepared prepared;
                Pull<A> pulls[most];
                for (int64_t begin = task * together, end = std::min(sets, begin + together); begin < end; begin += few) {
                    int64_t n = std::min(few, end - begin);
                    prepared.all = false;
                    for (int64_t set = begin; parts && set < begin + n; ++set)
                        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum_set(set, chunk, part(set, chunk), prepared);
                    if (!call.dx) continue;
                    prepared.all = parts && runs.size() <= HELD;
                    for (int64_t i = 0; i < n; ++i) pulls[i] = pull_of_parts(begin + i, part(begin + i, 0));
                    for (int64_t i = 0; i < n; ++i) pull_set(begin + i, pulls[i], 0, runs.size(), prepared);
                }
                if (streamed) end_of_stream();
            });
        }
        if (parameters) gather_constant(parts.get());
    }

    Gate<A> gate(A inverse, int64_t parameter) const {
        return {inverse * (call.weight ? call.weight[parameter] : A(1)), call.bias ? call.bias[parameter] : A(0)};
    }

    void sum_set(int64_t set, int64_t chunk, Pair<double> *part, Prepared &prepared) const {
        int64_t begin = chunk * CHUNK, end = end_of(chunk), first = first_cell(chunk);
        Place at = place_of(plan, runs, set);
        A c = center(set), scale = inverse(set);
        bool relu = plan.activation == NK_RELU;
        auto total = [&](const Stretch &s) {
            Gate<A> here = gate(scale, s.parameter);
            if (!curved && relu) return sum_constant<true>(call.dy + s.x, call.x + s.x, s.n, c, here);
            if (!curved) return sum_constant<false>(call.dy + s.x, call.x + s.x, s.n, c, here);
            Pair<double> sums{0, 0};
            gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                sums += sum_constant<false>(g, call.x + s.x + offset, n, c, here);
            });
            return sums;
        };
        if (!shared()) return walk(runs, at, begin, end, [&](const Stretch &s) { part[s.f * runs.mid + s.m - first] = total(s); });
        std::fill_n(part, runs.mid, Pair<double>{0, 0});
        if (curved || relu || runs.mid > 1) return walk(runs, at, begin, end, [&](const Stretch &s) { part[s.m] += total(s); });
        // Pieces may be short: their vectors are summed before their lanes are.
        for (int64_t from = begin; from < end; from += BLOCK) {
            Sums<A> sums;
            walk(runs, at, from, std::min(from + BLOCK, end), [&](const Stretch &s) {
                add_constant<false>(sums, call.dy + s.x, call.x + s.x, s.n, c, Gate<A>{});
            });
            part[0] += sums.total();
        }
    }

    // each(parameter, sums) for the sums of a set, in order.
    template <class Each> void each_part(int64_t set, const Pair<double> *parts, Each &&each) const {
        Place at = place_of(plan, runs, set);
        int64_t width = window(), chunks = runs.chunks();
        for (int64_t chunk = 0; chunk < chunks; ++chunk, parts += width) {
            int64_t first = first_cell(chunk), n = 1;
            if (runs.far * runs.mid > 1) n = shared() ? runs.mid : (end_of(chunk) - 1) / runs.length + 1 - first;
            for (int64_t i = 0; i < n; ++i) {
                int64_t f = first + i < runs.mid ? 0 : (first + i) / runs.mid, m = first + i - f * runs.mid;
                each(at.parameter + f * runs.per_far + m * runs.per_mid, parts[i]);
            }
        }
    }

    Pull<A> pull_of_parts(int64_t set, const Pair<double> *parts) const {
        Pair<double> sums{0, 0};
        if (pulled)
            each_part(set, parts, [&](int64_t parameter, const Pair<double> &part) {
                double gain = call.weight ? double(call.weight[parameter]) : 1;
                sums += Pair<double>{gain * part.g, gain * part.gx};
            });
        return pull_of(set, sums);
    }

    void pull_set(int64_t set, Pull<A> pull, int64_t begin, int64_t end, Prepared &prepared) const {
        int64_t ahead = curved ? 0 : step_ahead<T>(runs, 1);
        A scale = inverse(set);
        bool relu = plan.activation == NK_RELU;
        walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
            Gate<A> here = gate(scale, s.parameter);
            Pull<A> mine = pull;
            mine.inverse = here.scale;
            gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                int64_t p = s.x + offset;
                const T *dsum = along(call.dsum, p);
                auto go = [&](auto RELU, auto PULLED) {
                    pull_constant<RELU.value, PULLED.value>(g, call.x + p, dsum, call.dx + p, n, mine, here, ahead, streamed);
                };
                // Behind an activation that was prepared for, there is none left.
                constexpr bool raw = std::is_same_v<decltype(g), const T *>;
                with_flag(pulled, [&](auto PULLED) {
                    raw && relu ? go(std::bool_constant<raw>{}, PULLED) : go(std::false_type{}, PULLED);
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
    // Partial gradients lie half a page apart from one another, and a little further in it than dx: to a processor that compares addresses
    // within the page, they else seem to be what was just stored there.
    static constexpr int64_t PAGE = 4096 / sizeof(A);
    static int64_t spaced(int64_t n) { return (n + PAGE / 2 - 1) / PAGE * PAGE + PAGE / 2; }
    A *beside_dx(A *room) const {
        auto at = reinterpret_cast<std::uintptr_t>(room), dx = reinterpret_cast<std::uintptr_t>(call.dx) / LINE * LINE;
        return reinterpret_cast<A *>(at + (dx + 512 - at) % 4096);
    }

    // Of a stretch, as the loop wants them.
    struct Arranged {
        const A *gain;
        A *dgain, *dbias;
    };

    void run_varying() {
        Groups g = groups();
        Runs print = footprint();
        int64_t size = runs.size();
        // By the shape alone, as the order of the sums depends on it.
        int64_t together = std::min<int64_t>(std::max({(g.rows + 63) / 64, (CHUNK + size - 1) / size, int64_t(8)}), 512);
        int64_t batches = (g.rows + together - 1) / together;
        bool large = size * int64_t(sizeof(T)) > (1 << 19), few = g.count * batches < 8 && g.rows * g.count * size > 8 * CHUNK;
        if (print.size() == size && (large || few)) return run_by_columns(g);

        // A task has room for the gradients of gain and bias, and for the gain itself where that has to be brought into another order.
        int64_t width = spaced(print.size()), slots = 2 + reordered<T>;
        std::unique_ptr<A[]> room;
        A *parts = nullptr;
        if (parameters || reordered<T>) {
            room.reset(new A[std::size_t(g.count * batches * slots * width + PAGE)]);
            parts = beside_dx(room.get());
        }
        for_each(g.count * batches, [&](int64_t task) {
            int64_t group = task / batches, begin = task % batches * together, end = std::min(begin + together, g.rows);
            A *part = along(parts, task * slots * width);
            if (parameters)
                for (int slot = 0; slot < 2; ++slot) std::fill_n(part + slot * width, print.size(), A(0));
            if (int64_t first = set_of(g, group, begin); reordered<T> && first >= 0)
                walk(print, place_of(plan, runs, first), 0, print.size(), [&](const Stretch &s) {
                    arrange<T>(gain(s), part + 2 * width + s.index, s.n);
                });
            int64_t many = rows_at_once(size);
            for (int64_t row = begin; row < end;) {
                Together sets = next_sets(g, group, row, end, many);
                if (sets.count == 0) break;
                Prepared prepared;
                for (int64_t r = 0; r < sets.count; ++r)
                    sets.rows[r].pull = pull_of(sets.set[r], sum_varying(sets.set[r], 0, size, prepared));
                prepared.all = call.dx && pulled && size <= HELD;
                pull_sets(sets, 0, size, prepared, [&](const Stretch &s) {
                    int64_t run = (runs.per_far ? s.f : 0) * print.mid + (runs.per_mid ? s.m : 0);
                    A *at = along(part, run * runs.length + s.inside);
                    return Arranged{reordered<T> ? at + 2 * width : gain(s), at, along(at, width)};
                });
            }
            if (parameters && reordered<T>)
                for (int slot = 0; slot < 2; ++slot)
                    walk(print, Place{0, 0}, 0, print.size(), [&](const Stretch &s) {
                        rearrange<T>(part + slot * width + s.index, s.n);
                    });
            if (streamed) end_of_stream();
        });
        if (parameters) gather_varying(g, print, parts, batches, slots * width, width);
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
                part += sums.total();
            }
            total += part;
        }
        return total;
    }

    // Sets that share their parameters and are pulled together.
    struct Together {
        int64_t count = 0, set[2];
        Row<A> rows[2];
    };
    int64_t rows_at_once(int64_t size) const {
        bool two = parameters && call.dx && pulled && !curved && !call.dsum && !streamed && size * int64_t(sizeof(T)) <= 1 << 15;
        return two ? 2 : 1;
    }
    Together next_sets(const Groups &groups, int64_t group, int64_t &row, int64_t end, int64_t many) const {
        Together sets;
        int64_t first = 0;
        for (; row < end && sets.count < many; ++row) {
            int64_t set = set_of(groups, group, row);
            if (set < 0) continue;
            int64_t x = place_of(plan, runs, set).x;
            if (sets.count == 0) first = x;
            sets.set[sets.count] = set;
            sets.rows[sets.count++] = {x - first, {}};
        }
        return sets;
    }

    // `local` says where the gain of a stretch is, and where the gradients are gathered.
    template <class Local> void pull_sets(const Together &sets, int64_t begin, int64_t end, Prepared &prepared, Local &&local) const {
        int64_t ahead = curved ? 0 : step_ahead<T>(runs, 1);
        walk(runs, place_of(plan, runs, sets.set[0]), begin, end, [&](const Stretch &s) {
            Arranged at = local(s);
            gradients(s, sets.set[0], prepared, [&](auto *g, int64_t offset, int64_t n) {
                using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
                int64_t p = s.x + offset;
                Varying<G, T> to{g,
                                 call.x + p,
                                 along(call.dsum, p),
                                 along(call.dx, p),
                                 at.gain + offset,
                                 along(at.dgain, offset),
                                 along(at.dbias, offset),
                                 ahead,
                                 streamed};
                auto with_parameters = [&](auto DX, auto PULLED) {
                    constexpr bool dx = DX.value, pull = PULLED.value;
                    auto with_rows = [&](auto PARAMETERS) {
                        if constexpr (pull && std::is_same_v<G, T>)
                            if (sets.count == 2) return pull_varying<2, PARAMETERS.value, dx, pull>(to, sets.rows, n);
                        pull_varying<1, PARAMETERS.value, dx, pull>(to, sets.rows, n);
                    };
                    if (call.dbias) with_rows(std::integral_constant<int, 2>{});
                    else if (call.dweight) with_rows(std::integral_constant<int, 1>{});
                    else if constexpr (dx) pull_varying<1, 0, dx, pull>(to, sets.rows, n);
                };
                if (!call.dx) return with_parameters(std::false_type{}, std::false_type{});
                with_flag(pulled, [&](auto PULLED) { with_parameters(std::true_type{}, PULLED); });
            });
        });
    }

    // The batches' partial gradients, added in order.
    void gather_varying(const Groups &g, const Runs &print, const A *parts, int64_t batches, int64_t step, int64_t width) const {
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
                    const A *part = parts + (group * batches + batch) * step + (to == call.dbias ? width : 0) + begin;
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
            int64_t set = set_of(g, group, 0);
            if (set < 0) return;
            alignas(64) A dgain[BLOCK] = {}, dbias[BLOCK] = {}, arranged[BLOCK];
            if (reordered<T>)
                walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
                    arrange<T>(gain(s), arranged + s.index - begin, s.n);
                });
            Prepared prepared;
            for (int64_t row = 0; row < g.rows;) {
                Together sets = next_sets(g, group, row, g.rows, rows_at_once(0));
                if (sets.count == 0) break;
                for (int64_t r = 0; r < sets.count; ++r) {
                    Pair<double> sums{0, 0};
                    for (int64_t chunk = 0, at = sets.set[r] * chunks; !parts.empty() && chunk < chunks; ++chunk)
                        sums += parts[at + chunk];
                    sets.rows[r].pull = pull_of(sets.set[r], sums);
                }
                pull_sets(sets, begin, end, prepared, [&](const Stretch &s) {
                    int64_t at = s.index - begin;
                    return Arranged{reordered<T> ? arranged + at : gain(s), dgain + at, dbias + at};
                });
            }
            if (streamed) end_of_stream();
            walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
                for (auto [from, to] : {std::pair(dgain, call.dweight), std::pair(dbias, call.dbias)}) {
                    if (!to) continue;
                    rearrange<T>(from + s.index - begin, s.n);
                    std::copy_n(from + s.index - begin, s.n, to + s.parameter);
                }
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
