// Backward over sets whose elements lie next to one another: the two sums of a set, then dx while the set is in the cache.
//
// Where the gain is constant along runs, its gradient comes out of the same sums: that case is here.
#include "segments_backward.h"

namespace nk {
namespace {

// One gain and bias for the whole run: those of a ReLU that follows, or of the output.
template <class A> struct Gate {
    A scale, bias;
};

// The gradient behind the activation, and x - center.
template <int KIND, class V, class A> NK_INLINE std::pair<V, V> behind(const V &g, const V &x, Vec<A> center, Gate<A> gate) {
    if constexpr (KIND <= OUTPUT) return {passed<KIND, A>(x, g), (undone<KIND, A>(x) - splat<A>(gate.bias)) * splat<A>(1 / gate.scale)};
    V apart = x - center;
    if constexpr (KIND == NK_RELU) return {where_positive(apart * splat<A>(gate.scale) + splat<A>(gate.bias), g), apart};
    return {g, apart};
}

template <int KIND, class G, class T, class A = accumulator<T>>
NK_INLINE void add_constant(PairSums<A> &sums, const G *g, const T *x, int64_t n, A center, Gate<A> gate) {
    Vec<A> c = splat<A>(center);
    add_run<T>(sums, n, [&](auto &&at) { return behind<KIND>(at(g), at(x), c, gate); });
}

// The sums of a stretch, in blocks.
template <int KIND, class G, class T, class A = accumulator<T>>
NK_INLINE Pair<double> sum_constant(const G *g, const T *x, int64_t n, A center, Gate<A> gate) {
    Pair<double> total{0, 0};
    for (int64_t i = 0; i < n; i += BLOCK) {
        PairSums<A> sums;
        add_constant<KIND>(sums, g + i, x + i, std::min(BLOCK, n - i), center, gate);
        total += sums.total();
    }
    return total;
}

// dx of a run of one gain, which is in terms.inverse.
template <int KIND, bool COUPLED, class G, class T, class A = accumulator<T>>
void dx_constant(const G *g, const T *x, const T *dsum, T *dx, int64_t n, DxTerms<A> terms, Gate<A> gate, int64_t ahead, bool streamed) {
    Vec<A> c = splat<A>(terms.center), inverse = splat<A>(terms.inverse), along = splat<A>(terms.along), shift = splat<A>(terms.shift);
    auto value = [&](auto &&at) {
        auto [v, apart] = behind<KIND>(at(g), at(x), c, gate);
        v = v * inverse;
        if constexpr (COUPLED) v = v + (apart * along + shift);
        if (dsum) v = v + at(dsum);
        return v;
    };
    auto ask = [&](int64_t i) NK_ASK {
        if (!ahead) return;
        fetch<4 * LANES>(g + i + ahead);
        if constexpr (KIND != NK_LINEAR || COUPLED) fetch<4 * LANES>(x + i + ahead);
    };
    streamed ? fill_far<T>(dx, n, value, ask) : fill<T>(dx, n, value, ask);
}

template <class T> class ConstantGain : SegmentsBackward<T> {
    using Base = SegmentsBackward<T>;
    using typename Base::A, typename Base::Prepared;
    using Base::call, Base::center, Base::coupled, Base::curved, Base::dx_terms, Base::gradients, Base::inverse, Base::of_output,
        Base::parameters, Base::plan, Base::runs, Base::saved, Base::streamed;

  public:
    ConstantGain(const NkPlan &plan, const Backward<T> &call) : Base(plan, call) {}

    // The sums of a chunk lie apart for each run, or, where the runs of all pieces share a gain, for each run of a piece.
    bool shared() const { return runs.far > 1 && runs.per_far == 0; }
    int64_t window() const { return shared() ? runs.mid : std::min(runs.far * runs.mid, CHUNK / runs.length + 2); }
    int64_t first_cell(int64_t chunk) const { return shared() || chunk == 0 ? 0 : chunk * CHUNK / runs.length; }
    int64_t end_of(int64_t chunk) const { return std::min((chunk + 1) * CHUNK, runs.size()); }

    void run() {
        int64_t chunks = runs.chunks(), sets = runs.sets, width = window();
        Room<Pair<double>, 256> room;
        Pair<double> *parts = coupled || parameters ? room.take(sets * chunks * width) : nullptr;
        auto part = [&](int64_t set, int64_t chunk) { return along(parts, (set * chunks + chunk) * width); };
        if (chunks > 1 && sets < 4 * threads()) {
            for_each(parts ? sets * chunks : 0, [&](int64_t task) {
                Prepared prepared;
                sum_set(task / chunks, task % chunks, part(task / chunks, task % chunks), prepared);
            });
            for_each(call.dx ? sets * chunks : 0, [&](int64_t task) {
                Prepared prepared;
                int64_t set = task / chunks, chunk = task % chunks;
                write_dx(set, dx_terms_of_parts(set, part(set, 0)), chunk * CHUNK, end_of(chunk), prepared);
                if (streamed) end_of_stream();
            });
        } else {
            // From the sums to the terms of dx it is a long way of short steps: those of a few small sets overlap.
            constexpr int64_t most = 8;
            int64_t few = curved || runs.size() * int64_t(sizeof(T)) > 2048 ? 1 : most;
            int64_t together = std::max<int64_t>(1, CHUNK / (runs.size() * few)) * few;
            for_each((sets + together - 1) / together, [&](int64_t task) {
                Prepared prepared;
                DxTerms<A> terms[most];
                for (int64_t begin = task * together, end = std::min(sets, begin + together); begin < end; begin += few) {
                    int64_t n = std::min(few, end - begin);
                    prepared.all = false;
                    for (int64_t set = begin; parts && set < begin + n; ++set)
                        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum_set(set, chunk, part(set, chunk), prepared);
                    if (!call.dx) continue;
                    prepared.all = parts && runs.size() <= HELD;
                    for (int64_t i = 0; i < n; ++i) terms[i] = dx_terms_of_parts(begin + i, part(begin + i, 0));
                    for (int64_t i = 0; i < n; ++i) write_dx(begin + i, terms[i], 0, runs.size(), prepared);
                }
                if (streamed) end_of_stream();
            });
        }
        if (parameters) reduce_partials(parts);
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
            if (saved) return of_output([&](auto KIND) { return sum_constant<KIND.value>(call.dy + s.x, call.x + s.x, s.n, c, here); });
            if (!curved && relu) return sum_constant<NK_RELU>(call.dy + s.x, call.x + s.x, s.n, c, here);
            if (!curved) return sum_constant<NK_LINEAR>(call.dy + s.x, call.x + s.x, s.n, c, here);
            Pair<double> sums{0, 0};
            gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                sums += sum_constant<NK_LINEAR>(g, call.x + s.x + offset, n, c, here);
            });
            return sums;
        };
        if (!shared()) return walk(runs, at, begin, end, [&](const Stretch &s) { part[s.f * runs.mid + s.m - first] = total(s); });
        std::fill_n(part, runs.mid, Pair<double>{0, 0});
        if (curved || relu || runs.mid > 1) return walk(runs, at, begin, end, [&](const Stretch &s) { part[s.m] += total(s); });
        // Pieces may be short: their vectors are summed before their lanes are.
        for (int64_t from = begin; from < end; from += BLOCK) {
            PairSums<A> sums;
            walk(runs, at, from, std::min(from + BLOCK, end), [&](const Stretch &s) {
                if (saved) of_output([&](auto KIND) { add_constant<KIND.value>(sums, call.dy + s.x, call.x + s.x, s.n, c, gate(scale, s.parameter)); });
                else add_constant<NK_LINEAR>(sums, call.dy + s.x, call.x + s.x, s.n, c, Gate<A>{});
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

    DxTerms<A> dx_terms_of_parts(int64_t set, const Pair<double> *parts) const {
        Pair<double> sums{0, 0};
        if (coupled)
            each_part(set, parts, [&](int64_t parameter, const Pair<double> &part) {
                double gain = call.weight ? double(call.weight[parameter]) : 1;
                sums += Pair<double>{gain * part.g, gain * part.gx};
            });
        return dx_terms(set, sums);
    }

    void write_dx(int64_t set, DxTerms<A> terms, int64_t begin, int64_t end, Prepared &prepared) const {
        int64_t ahead = curved ? 0 : step_ahead<T>(runs, 1);
        A scale = inverse(set);
        bool relu = plan.activation == NK_RELU;
        walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) {
            Gate<A> here = gate(scale, s.parameter);
            DxTerms<A> mine = terms;
            mine.inverse = here.scale;
            gradients(s, set, prepared, [&](auto *g, int64_t offset, int64_t n) {
                int64_t p = s.x + offset;
                const T *dsum = along(call.dsum, p);
                auto go = [&](auto KIND, auto COUPLED) {
                    dx_constant<KIND.value, COUPLED.value>(g, call.x + p, dsum, call.dx + p, n, mine, here, ahead, streamed);
                };
                // Behind an activation that was prepared for, there is none left.
                constexpr bool raw = std::is_same_v<decltype(g), const T *>;
                with_flag(coupled, [&](auto COUPLED) {
                    if constexpr (raw)
                        if (this->saved) return this->of_output([&](auto KIND) { go(KIND, COUPLED); });
                    raw && relu ? go(std::integral_constant<int, raw ? NK_RELU : NK_LINEAR>{}, COUPLED)
                                : go(std::integral_constant<int, NK_LINEAR>{}, COUPLED);
                });
            });
        });
    }

    void reduce_partials(const Pair<double> *parts) const {
        Room<Pair<double>, 256> room;
        Pair<double> *total = room.take(plan.parameters);
        std::fill_n(total, plan.parameters, Pair<double>{0, 0});
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
};

}  // namespace

template <class T> void segments_backward(const NkPlan &plan, const Backward<T> &call) {
    if (call.dweight) std::fill_n(call.dweight, plan.parameters, accumulator<T>(0));
    if (call.dbias) std::fill_n(call.dbias, plan.parameters, accumulator<T>(0));
    bool varies = runs_of(plan, call.weight || call.bias || call.dweight || call.dbias).vector;
    varies ? segments_backward_varying(plan, call) : ConstantGain<T>(plan, call).run();
}

#define MAKE(T) template void segments_backward<T>(const NkPlan &, const Backward<T> &);
NK_EACH_TYPE(MAKE)

}  // namespace nk
