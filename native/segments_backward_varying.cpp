// Backward over sets whose elements lie next to one another, where the gain varies along their runs: its gradient is gathered next to dx,
// in one partial buffer for each batch of sets, or, in sets too large for that, by going down the sets for a few columns at a time.
#include <vector>

#include "segments_backward.h"

namespace nk {
namespace {

// What makes x - center of an output: its activation, bias and gain are undone, and what is left gets the scale of x.
template <class A> struct Output {
    const A *bias, *ungain;

    template <int KIND, class V, class At> NK_INLINE V apart(const V &y, At &&at, Vec<A> scale) const {
        return (undone<KIND, A>(y) - at(bias)) * (at(ungain) * scale);
    }
};

template <int KIND, class G, class T, class A = accumulator<T>>
NK_INLINE void add_varying(PairSums<A> &sums, const G *g, const T *x, const A *gain, int64_t n, A center, Output<A> output) {
    Vec<A> c = splat<A>(center);
    add_run<T>(sums, n, [&](auto &&at) {
        auto y = at(x);
        if constexpr (KIND <= OUTPUT) return std::pair(passed<KIND, A>(y, at(g)) * at(gain), output.template apart<KIND>(y, at, c));
        else return std::pair(at(g) * at(gain), y - c);
    });
}

// A set whose parameters vary along its runs, next to others that share them: where it is from the first of them.
template <class A> struct Row {
    int64_t x;
    DxTerms<A> terms;
};

template <class G, class T, class A = accumulator<T>> struct Varying {
    const G *g;
    const T *x, *dsum;
    T *dx;
    const A *gain;
    A *dgain, *dbias;
    int64_t ahead;
    bool streamed;
    Output<A> output;
};

// dx of a run in some sets, and what they add to the gradients of gain and bias, which are read and written once for all. ROWS is their
// number, or 0 where that is in `count`: short runs, of which many go fastest. Gain and gradients are arranged as T wants them.
template <int ROWS, int PARAMETERS, bool DX, bool COUPLED, int KIND, class G, class T, class A = accumulator<T>>
void dx_varying(Varying<G, T> to, const Row<A> *sets, int64_t count, int64_t n) {
    Row<A> own[std::max(ROWS, 1)];
    std::copy_n(sets, ROWS, own);
    const Row<A> *rows = ROWS ? own : sets;
    if (ROWS) count = ROWS;
    auto element = [&](const Row<A> &row, auto &&at, auto gain, auto &dgain, auto &dbias) NK_ASK {
        auto g = at(to.g + row.x), apart = g;
        Vec<A> center = splat<A>(row.terms.center);
        if constexpr (KIND <= OUTPUT) {
            auto y = at(to.x + row.x);
            g = passed<KIND, A>(y, g), apart = to.output.template apart<KIND>(y, at, center);
        } else if constexpr (COUPLED || PARAMETERS > 0) {
            apart = at(to.x + row.x) - center;
        }
        auto scaled = g * splat<A>(row.terms.inverse), dx = scaled;
        if constexpr (PARAMETERS > 0) dgain += scaled * apart;
        if constexpr (PARAMETERS > 1) dbias += g;
        if constexpr (DX) dx = scaled * gain;
        if constexpr (DX && COUPLED) dx += apart * splat<A>(row.terms.along) + splat<A>(row.terms.shift);
        if (DX && ROWS == 1 && to.dsum) dx += at(to.dsum);
        return dx;
    };
    auto twins = [&](int64_t i, auto STREAM) NK_ASK {
        auto at = [i](auto *p) { return load_twin<T>(p + i); };
        const Twin<A> gain = load_twin<A>(to.gain + i);
        Twin<A> dgain{}, dbias{};
        if constexpr (PARAMETERS > 0) dgain = load_twin<A>(to.dgain + i);
        if constexpr (PARAMETERS > 1) dbias = load_twin<A>(to.dbias + i);
        // Two are read before they are written: sets may lie a multiple of the page apart, and then a load seems to want the last store.
        constexpr int step = ROWS == 2 ? 2 : 1;
        for (int64_t r = 0; r < count; r += step) {
            Twin<A> dx[step];
            for (int u = 0; u < step; ++u) dx[u] = element(rows[r + u], at, gain, dgain, dbias);
            for (int u = 0; DX && u < step; ++u) {
                T *out = to.dx + rows[r + u].x + i;
                STREAM.value ? stream_twin<T>(out, dx[u]) : store_twin<T>(out, dx[u]);
            }
        }
        if constexpr (PARAMETERS > 0) store_twin<A>(to.dgain + i, dgain);
        if constexpr (PARAMETERS > 1) store_twin<A>(to.dbias + i, dbias);
    };
    constexpr int64_t line = std::max<int64_t>(LINE / int64_t(sizeof(T)), 2 * LANES);
    int64_t i = 0;
    auto lines = [&](auto STREAM) NK_ASK {
        for (; i + line <= n; i += line) {
            for (int64_t r = 0; to.ahead && r < count; ++r) {
                fetch<line>(to.g + rows[r].x + i + to.ahead);
                if constexpr (COUPLED || PARAMETERS > 0 || KIND <= OUTPUT) fetch<line>(to.x + rows[r].x + i + to.ahead);
            }
            for (int64_t j = i; j < i + line; j += 2 * LANES) twins(j, STREAM);
        }
    };
    to.streamed ? lines(std::true_type{}) : lines(std::false_type{});
    for (; i + 2 * LANES <= n; i += 2 * LANES) twins(i, std::false_type{});
    for (; i < n; i += LANES) {
        const TailAt at{i, std::min<int64_t>(LANES, n - i)};
        Vec<A> dgain{}, dbias{};
        for (int64_t r = 0; r < count; ++r) {
            Vec<A> dx = element(rows[r], at, at(to.gain), dgain, dbias);
            if constexpr (DX) at.put(to.dx + rows[r].x, dx);
        }
        if constexpr (PARAMETERS > 0) at.put(to.dgain, at(to.dgain) + dgain);
        if constexpr (PARAMETERS > 1) at.put(to.dbias, at(to.dbias) + dbias);
    }
}

template <class T> class VaryingGain : SegmentsBackward<T> {
    using Base = SegmentsBackward<T>;
    using typename Base::A, typename Base::Prepared;
    using Base::call, Base::center, Base::coupled, Base::curved, Base::dx_terms, Base::gradients, Base::parameters, Base::plan, Base::runs,
        Base::saved, Base::streamed;
    std::vector<A> ones;             // a gain, where there is a bias alone
    std::vector<A> biases, ungains;  // of an output

  public:
    VaryingGain(const NkPlan &plan, const Backward<T> &call) : Base(plan, call) {
        if (!call.weight) ones.assign(std::size_t(runs.length), A(1));
        int64_t bytes = runs.size() * int64_t(sizeof(T));
        bool some = parameters && call.dx && coupled && !curved && !call.dsum;
        few = some ? std::clamp<int64_t>(4096 / bytes, bytes <= 1 << 15 ? 2 : 1, MOST) : 1;
        if (!saved) return;
        biases.assign(std::size_t(plan.parameters), A(0)), ungains.assign(std::size_t(plan.parameters), A(1));
        for (int64_t p = 0; p < plan.parameters; ++p) {
            if (call.bias) biases[p] = call.bias[p];
            if (call.weight) ungains[p] = 1 / call.weight[p];
        }
    }

    // Sets that share their parameters: first the sums of all, then dx of two at once, or of all where they are short.
    static constexpr int64_t MOST = LANES / 2;
    struct Together {
        int64_t count = 0, set[MOST];
        DxTerms<A> terms[MOST];
    };
    int64_t few;
    Together next_sets(const Groups &groups, int64_t group, int64_t &row, int64_t end) const {
        Together sets;
        for (; row < end && sets.count < few; ++row)
            if (int64_t set = groups.set(group, row); set >= 0) sets.set[sets.count++] = set;
        return sets;
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

    void run() {
        const Groups g(plan, runs);
        Runs print = footprint();
        int64_t size = runs.size();
        // By the shape alone, as the order of the sums depends on it.
        int64_t together = std::min<int64_t>(std::max({(g.rows + 63) / 64, (CHUNK + size - 1) / size, int64_t(8)}), 512);
        int64_t batches = (g.rows + together - 1) / together;
        bool large = size * int64_t(sizeof(T)) > (1 << 19), few = g.count * batches < 8 && g.rows * g.count * size > 8 * CHUNK;
        if (print.size() == size && (large || few)) return run_by_columns(g);

        // A task has room for the gradients of gain and bias, and for the gain itself where that has to be brought into another order.
        int64_t width = spaced(print.size()), slots = 2 + reordered<T>;
        Room<A, 3072> room;
        A *parts = parameters || reordered<T> ? beside_dx(room.take(g.count * batches * slots * width + PAGE)) : nullptr;
        for_each(g.count * batches, [&](int64_t task) {
            int64_t group = task / batches, begin = task % batches * together, end = std::min(begin + together, g.rows);
            A *part = along(parts, task * slots * width);
            for (int slot = 0; parameters && slot < 2; ++slot) std::fill_n(part + slot * width, print.size(), A(0));
            if (int64_t first = g.set(group, begin); first >= 0) arrange_gain(print, first, 0, print.size(), along(part, 2 * width));
            for (int64_t row = begin; row < end;) {
                Together sets = next_sets(g, group, row, end);
                if (sets.count == 0) break;
                Prepared prepared;
                find_dx_terms(sets, prepared);
                prepared.all = call.dx && coupled && size <= HELD;
                write_dx(sets, 0, size, prepared, [&](const Stretch &s) {
                    int64_t run = (runs.per_far ? s.f : 0) * print.mid + (runs.per_mid ? s.m : 0);
                    A *at = along(part, run * runs.length + s.inside);
                    return Arranged{reordered<T> ? at + 2 * width : gain(s), at, along(at, width)};
                });
            }
            if (parameters && reordered<T>)
                walk(print, Place{0, 0}, 0, print.size(), [&](const Stretch &s) {
                    for (A *sums : {part, part + width}) rearrange<T>(sums + s.index, s.n);
                });
            if (streamed) end_of_stream();
        });
        if (parameters) reduce_partials(g, print, parts, batches, slots * width, width);
    }

    Output<A> output(int64_t parameter) const { return saved ? Output<A>{biases.data() + parameter, ungains.data() + parameter} : Output<A>{}; }
    const A *gain(const Stretch &s) const { return call.weight ? call.weight + s.parameter : ones.data() + s.inside; }

    // Of the elements [begin, end) of a set, where T has another order.
    void arrange_gain(const Runs &print, int64_t set, int64_t begin, int64_t end, A *to) const {
        if (reordered<T>)
            walk(print, place_of(plan, runs, set), begin, end, [&](const Stretch &s) { arrange<T>(gain(s), to + s.index - begin, s.n); });
    }

    void find_dx_terms(Together &sets, Prepared &prepared) const {
        if (curved || !call.dx || !coupled || runs.length != runs.size() || runs.length > BLOCK) {
            for (int64_t r = 0; r < sets.count; ++r)
                sets.terms[r] = dx_terms(sets.set[r], sum_varying(sets.set[r], 0, runs.size(), prepared));
            return;
        }
        // Sets of one run, as most are: all in registers, and the lanes of all their sums are added up at once.
        Vec<A> sums[LANES];
        for (int64_t r = sets.count; r < MOST; ++r) sums[r] = sums[MOST + r] = Vec<A>{};
        for (int64_t r = 0; r < sets.count; ++r) {
            Place at = place_of(plan, runs, sets.set[r]);
            PairSums<A> pair;
            const A *gain = call.weight ? call.weight + at.parameter : ones.data();
            auto add = [&](auto KIND) {
                add_varying<KIND.value>(pair, call.dy + at.x, call.x + at.x, gain, runs.length, center(sets.set[r]), output(at.parameter));
            };
            saved ? this->of_output(add) : add(std::integral_constant<int, NK_LINEAR>{});
            sums[r] = (pair.g[0] + pair.g[1]) + (pair.g[2] + pair.g[3]);
            sums[MOST + r] = (pair.gx[0] + pair.gx[1]) + (pair.gx[2] + pair.gx[3]);
        }
        alignas(64) A totals[LANES];
        store(totals, sum_each<A>(sums));
        for (int64_t r = 0; r < sets.count; ++r) sets.terms[r] = dx_terms(sets.set[r], {totals[r], totals[MOST + r]});
    }

    Pair<double> sum_varying(int64_t set, int64_t begin, int64_t end, Prepared &prepared) const {
        Pair<double> total{0, 0};
        if (!call.dx || !coupled) return total;
        Place at = place_of(plan, runs, set);
        A c = center(set);
        for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
            Pair<double> part{0, 0};
            for (int64_t from = chunk, last = std::min(chunk + CHUNK, end); from < last; from += BLOCK) {
                PairSums<A> sums;
                walk(runs, at, from, std::min(from + BLOCK, last), [&](const Stretch &s) {
                    gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                        const T *x = call.x + s.x + offset;
                        if constexpr (std::is_same_v<decltype(g), const T *>)
                            if (this->saved)
                                return this->of_output([&](auto KIND) {
                                    add_varying<KIND.value>(sums, g, x, gain(s) + offset, n, c, output(s.parameter));
                                });
                        add_varying<NK_LINEAR>(sums, g, x, gain(s) + offset, n, c, Output<A>{});
                    });
                });
                part += sums.total();
            }
            total += part;
        }
        return total;
    }

    // `local` says where the gain of a stretch is, and where the gradients are gathered.
    template <class Local> void write_dx(const Together &sets, int64_t begin, int64_t end, Prepared &prepared, Local &&local) const {
        int64_t ahead = curved ? 0 : step_ahead<T>(runs, few), together = few > 2 ? few : 2;
        for (int64_t first = 0; first < sets.count; first += together) {
            Row<A> rows[MOST];
            int64_t count = std::min(together, sets.count - first);
            Place at = place_of(plan, runs, sets.set[first]);
            for (int64_t r = 0; r < count; ++r)
                rows[r] = {place_of(plan, runs, sets.set[first + r]).x - at.x, sets.terms[first + r]};
            walk(runs, at, begin, end, [&](const Stretch &s) {
                Arranged at = local(s);
                gradients(s, sets.set[first], prepared, [&](auto *g, int64_t offset, int64_t n) {
                    using G = std::remove_const_t<std::remove_pointer_t<decltype(g)>>;
                    int64_t p = s.x + offset;
                    A *dgain = along(at.dgain, offset), *dbias = along(at.dbias, offset);
                    Varying<G, T> to{g,     call.x + p, along(call.dsum, p), along(call.dx, p), at.gain + offset, dgain,
                                     dbias, ahead,      streamed,            output(s.parameter)};
                    auto with_parameters = [&](auto DX, auto COUPLED) {
                        constexpr bool dx = DX.value, couples = COUPLED.value;
                        constexpr bool raw = std::is_same_v<G, T>;
                        auto with_rows = [&](auto PARAMETERS, auto KIND) {
                            if constexpr (couples && raw && PARAMETERS.value > 0)
                                if (count > 1)
                                    return (count == 2 ? dx_varying<2, PARAMETERS.value, dx, couples, KIND.value, T, T>
                                                       : dx_varying<0, PARAMETERS.value, dx, couples, KIND.value, T, T>)(to, rows, count, n);
                            for (int64_t r = 0; r < count; ++r) dx_varying<1, PARAMETERS.value, dx, couples, KIND.value>(to, rows + r, 1, n);
                        };
                        auto go = [&](auto KIND) {
                            if (call.dbias) with_rows(std::integral_constant<int, 2>{}, KIND);
                            else if (call.dweight) with_rows(std::integral_constant<int, 1>{}, KIND);
                            else if constexpr (dx) with_rows(std::integral_constant<int, 0>{}, KIND);
                        };
                        if constexpr (raw)
                            if (this->saved) return this->of_output(go);
                        go(std::integral_constant<int, NK_LINEAR>{});
                    };
                    if (!call.dx) return with_parameters(std::false_type{}, std::false_type{});
                    with_flag(coupled, [&](auto COUPLED) { with_parameters(std::true_type{}, COUPLED); });
                });
            });
        }
    }

    // The batches' partial gradients, added in order.
    void reduce_partials(const Groups &g, const Runs &print, const A *parts, int64_t batches, int64_t step, int64_t width) const {
        int64_t stripes = (print.size() + PIECE - 1) / PIECE;
        for_each(g.count * stripes, [&](int64_t task) {
            int64_t group = task / stripes, begin = task % stripes * PIECE, n = std::min(PIECE, print.size() - begin);
            int64_t set = g.set(group, 0);
            if (set < 0) return;
            Place at = place_of(plan, runs, set);
            for (A *to : {call.dweight, call.dbias}) {
                if (!to) continue;
                double total[PIECE] = {};
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
        std::vector<Pair<double>> parts(call.dx && coupled ? runs.sets * chunks : 0);
        for_each(parts.size(), [&](int64_t task) {
            Prepared prepared;
            int64_t begin = task % chunks * CHUNK;
            parts[task] = sum_varying(task / chunks, begin, std::min(begin + CHUNK, size), prepared);
        });
        int64_t stripes = (size + BLOCK - 1) / BLOCK;
        for_each(g.count * stripes, [&](int64_t task) {
            int64_t group = task / stripes, begin = task % stripes * BLOCK, end = std::min(begin + BLOCK, size);
            int64_t set = g.set(group, 0);
            if (set < 0) return;
            alignas(64) A dgain[BLOCK] = {}, dbias[BLOCK] = {}, arranged[BLOCK];
            arrange_gain(runs, set, begin, end, arranged);
            Prepared prepared;
            for (int64_t row = 0; row < g.rows;) {
                Together sets = next_sets(g, group, row, g.rows);
                if (sets.count == 0) break;
                for (int64_t r = 0; r < sets.count; ++r) {
                    Pair<double> sums{0, 0};
                    for (int64_t chunk = 0, at = sets.set[r] * chunks; !parts.empty() && chunk < chunks; ++chunk)
                        sums += parts[at + chunk];
                    sets.terms[r] = dx_terms(sets.set[r], sums);
                }
                write_dx(sets, begin, end, prepared, [&](const Stretch &s) {
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

template <class T> void segments_backward_varying(const NkPlan &plan, const Backward<T> &call) { VaryingGain<T>(plan, call).run(); }

#define MAKE(T) template void segments_backward_varying<T>(const NkPlan &, const Backward<T> &);
NK_EACH_TYPE(MAKE)

}  // namespace nk
