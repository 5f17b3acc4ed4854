// Forward over sets whose elements lie next to one another: measure a set, then map it while it is in the cache.
#include <limits>
#include <utility>
#include <vector>

#include "activation.h"
#include "kernels.h"
#include "segments.h"
#include "threads.h"

namespace nk {
namespace {

constexpr int64_t FIRST_CACHE = 1 << 15, SECOND_CACHE = 1 << 20;  // bytes
constexpr int64_t PIECE = 1024;           // of values before a curved activation

// Sums of up to BLOCK elements about a shift: of x - shift, and of its square.
template <class A> struct Block {
    A shift;
    double first, second;
};

template <class A> struct Sums : PairSums<A> {
    template <class T> NK_INLINE void add(const T *x, int64_t n, Vec<A> shift) {
        add_run<T>(*this, n, [&](auto &&at) {
            auto apart = at(x) - shift;
            return std::pair(apart, apart);
        });
    }
};

// The same sums in double, for squares that float can't hold.
struct WideSums {
    double first = 0, second = 0;

    template <class T, class A> void add(const T *x, int64_t n, A shift) {
        for (int64_t i = 0; i < n; ++i) {
            double apart = double(widen(x[i])) - double(shift);
            first += apart;
            second += apart * apart;
        }
    }
};

// About the mean of the first four vectors of a run: about its first element alone, an outlier there would cost as many digits as its square
// has. Differences from the first element make it exact where all elements are equal.
template <class T, class A = accumulator<T>> NK_INLINE A shift_of(const T *x, int64_t n) {
    A begin = widen(x[0]);
    int64_t some = n < LANES ? n : std::min<int64_t>(n / LANES * LANES, 4 * LANES);
    // Each has its share taken before they are added up: the sum of large numbers might be infinite.
    Vec<A> about = splat<A>(begin), share = splat<A>(A(1) / A(some)), sum{};
    for (int64_t i = 0; i + LANES <= some; i += LANES) sum += (load(x + i) - about) * share;
    if (n < LANES) sum = select<A>(first<A>(n), (load_some(x, n) - about) * share, sum);
    return begin + sum_lanes<A>(sum);
}

// The sums of n elements that read(sums, shift) adds. Where the shift turns out over half a deviation from the mean, the variance would come
// out of a difference of larger numbers: the elements, still in the cache, are read once more, about their mean.
template <class A, bool CENTRED, class Read> NK_INLINE Block<A> block_of(int64_t n, A shift, Range range, Read &&read) {
    const double share = 1 / double(n);
    Block<A> block;
    for (int attempt = 1;; ++attempt) {
        Sums<A> sums;
        read(sums, splat<A>(shift));
        auto [first, second] = sums.total();
        block = {shift, CENTRED ? first : 0, second};
        double apart = block.first * share, lost = block.first * apart;
        if (attempt == 2 || !(4 * lost > block.second - lost)) break;
        shift += A(apart);
    }
    if (range.lacks(block.second)) {
        WideSums sums;
        read(sums, shift);
        block = {shift, CENTRED ? sums.first : 0, sums.second};
    }
    return block;
}

// What becomes of x without gain and bias: (x - high) * inverse - low.
template <class A> struct Map {
    A high, inverse, low;
};

// By given statistics sets need not be whole: in the order of memory, pieces of one are sets with the same statistic.
NkPlan in_order(NkPlan plan) {
    if (plan.given && plan.outer == 1 && plan.per_far == 0) std::swap(plan.outer, plan.far);
    return plan;
}

template <class T> class SegmentsForward {
    using A = accumulator<T>;
    const int64_t statistics;
    const NkPlan plan;
    const Forward<T> call;
    const Runs whole, runs;  // for reading alone, and with the parameters
    const T *x;              // what is normalized
    const int64_t few;       // small sets that are measured before they are mapped
    const int64_t ahead;
    const bool curved, streamed;
    const Range range;  // of a block
    const A least;
    const Mapper<T, T> straight;
    const Mapper<A, T> before_curve;

  public:
    SegmentsForward(const NkPlan &plan, const Forward<T> &call)
        : statistics(plan.outer * plan.kept), plan(in_order(plan)), call(call), whole(runs_of(this->plan, false)),
          runs(runs_of(this->plan, call.weight || call.bias)), x(call.residual ? call.sum : call.x),
          few(few_of(whole.size() * int64_t(sizeof(T)))),
          ahead(plan.given ? 0 : step_ahead<T>(whole, whole.size() <= BLOCK ? few : 1)),
          curved(plan.activation > NK_RELU), streamed(streams(runs.length * int64_t(sizeof(T)))),
          range(Range::of<A>(plan, std::min(whole.size(), BLOCK))),
          least(plan.activation == NK_RELU ? A(0) : -std::numeric_limits<A>::infinity()),
          straight((streamed ? mapper<T, T, true> : mapper<T, T, false>)(runs.vector && call.weight, runs.vector && call.bias)),
          before_curve(mapper<A, T, false>(runs.vector && call.weight, runs.vector && call.bias)) {}

    void run() {
        int64_t size = runs.size(), chunks = whole.chunks();
        if (size <= BLOCK) return plan.centred ? run_small<true>() : run_small<false>();
        if (runs.sets < 4 * threads() && chunks > 1) return run_in_chunks(chunks);
        int64_t together = std::max<int64_t>(1, CHUNK / size);
        for_each((runs.sets + together - 1) / together, [&](int64_t task) {
            for (int64_t set = task * together, end = std::min(runs.sets, set + together); set < end; ++set) {
                Moments<double> moments;
                for (int64_t chunk = 0; chunk < chunks; ++chunk) moments = merge(moments, measure(set, chunk));
                apply(set, map_of(set, moments), 0, size);
            }
            if (streamed) end_of_stream();
        });
    }

  private:
    // In the cache, many sets hide the steps of each. From memory, reading and writing in turns of more than half a page takes up to twice
    // the time.
    int64_t few_of(int64_t bytes) const {
        bool many = bytes * whole.sets <= SECOND_CACHE / 2 || (bytes <= 1024 && streams(runs.length * int64_t(sizeof(T))));
        return std::clamp<int64_t>((many ? FIRST_CACHE : 2048) / bytes, 1, LANES);
    }
    bool streams(int64_t bytes) const {
        bool lines = bytes >= 8 * LINE || (bytes % LINE == 0 && until_line(call.y) == 0);
        return plan.stream && lines && x != call.y && on_element(call.y);
    }

    // Statistics of a few sets: no more than a vector has lanes.
    struct Batch {
        A shift[LANES] = {}, high[LANES], inverse[LANES], low[LANES];
        double first[LANES] = {}, second[LANES] = {};
    };

    // Each step from a set's first elements to its scale waits for the one before: sets of one block take every step together, one set in
    // each lane.
    template <bool CENTRED> void run_small() {
        int64_t size = runs.size(), together = std::max<int64_t>(1, CHUNK / (size * few)) * few;
        for_each((runs.sets + together - 1) / together, [&](int64_t task) {
            for (int64_t set = task * together, end = std::min(runs.sets, set + together); set < end; set += few) {
                Batch batch;
                int64_t n = std::min(few, end - set);
                if (!plan.given) {
                    for (int64_t i = 0; i < n; ++i) batch.shift[i] = begin_small<CENTRED>(set + i);
                    for (int64_t i = 0; i < n; ++i) {
                        auto block = measure_small<CENTRED>(set + i, batch.shift[i]);
                        batch.shift[i] = block.shift, batch.first[i] = block.first, batch.second[i] = block.second;
                    }
                    finalize<CENTRED>(set, n, batch);
                }
                for (int64_t i = 0; i < n; ++i)
                    apply(set + i, plan.given ? given(set + i) : Map<A>{batch.high[i], batch.inverse[i], batch.low[i]}, 0, size);
            }
            if (streamed) end_of_stream();
        });
    }

    template <bool CENTRED> NK_INLINE A begin_small(int64_t set) const {
        Place at = place_of(plan, whole, set);
        if (call.residual) add_residuals(at, 0, whole.size());
        return CENTRED ? shift_of(x + at.x, whole.length) : A(0);
    }

    template <bool CENTRED> NK_INLINE Block<A> measure_small(int64_t set, A shift) const {
        int64_t size = whole.size();
        Place at = place_of(plan, whole, set);
        if (whole.far > 1) return block_about<CENTRED>(at, 0, size, shift);
        return block_of<A, CENTRED>(size, shift, range, [&](auto &sums, auto about) { sums.add(x + at.x, size, about); });
    }

    template <bool CENTRED> void finalize(int64_t set, int64_t n, Batch &batch) const {
        const double share = 1 / double(whole.size());
        if constexpr (CENTRED)
            for (int i = 0; i < LANES; ++i) {
                double apart = batch.first[i] * share, square = batch.second[i] - batch.first[i] * apart;
                batch.second[i] = square < 0 ? 0 : square;
                batch.high[i] = A(batch.shift[i] + apart);
                batch.low[i] = A((batch.shift[i] - double(batch.high[i])) + apart);
            }
        inverse_scales(plan, batch.second, batch.inverse, n);
        for (int64_t i = 0; i < n; ++i) {
            if constexpr (CENTRED) batch.low[i] *= batch.inverse[i];
            else batch.high[i] = batch.low[i] = 0;
        }
        if (call.inverse) std::copy_n(batch.inverse, n, call.inverse + set);
        if (call.center) std::copy_n(batch.high, n, call.center + set);
        for (int64_t i = 0; call.variance && i < n; ++i) call.variance[set + i] = A(batch.second[i] * share);
    }

    // Few and large sets: first all the parts are measured, then all are mapped.
    void run_in_chunks(int64_t chunks) {
        std::vector<Moments<double>> parts(runs.sets * chunks);
        for_each(runs.sets * chunks, [&](int64_t task) { parts[task] = measure(task / chunks, task % chunks); });
        std::vector<Map<A>> maps(runs.sets);
        for (int64_t set = 0; set < runs.sets; ++set) {
            Moments<double> moments;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) moments = merge(moments, parts[set * chunks + chunk]);
            maps[set] = map_of(set, moments);
        }
        for_each(runs.sets * chunks, [&](int64_t task) {
            int64_t set = task / chunks, begin = task % chunks * CHUNK;
            apply(set, maps[set], begin, std::min(begin + CHUNK, runs.size()));
            if (streamed) end_of_stream();
        });
    }

    void add_residuals(Place at, int64_t begin, int64_t end) const {
        walk(whole, at, begin, end, [&](const Stretch &s) {
            const T *a = call.x + s.x, *b = call.residual + s.x;
            fill<T>(call.sum + s.x, s.n, [&](auto &&at) { return at(a) + at(b); }, [](int64_t) {});
        });
    }

    Moments<double> measure(int64_t set, int64_t chunk) const {
        int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, whole.size());
        Place at = place_of(plan, whole, set);
        if (plan.given) return {};
        return plan.centred ? measure_chunk<true>(at, begin, end) : measure_chunk<false>(at, begin, end);
    }

    template <bool CENTRED> Moments<double> measure_chunk(Place at, int64_t begin, int64_t end) const {
        Moments<double> moments;
        A shift = 0;
        for (int64_t from = begin; from < end; from += BLOCK) {
            int64_t to = std::min(from + BLOCK, end);
            double n = double(to - from);
            if (call.residual) add_residuals(at, from, to);
            // About the chunk's first elements, then about the mean of the block before.
            if (CENTRED && from == begin)
                walk(whole, at, begin, begin + 1, [&](const Stretch &s) {
                    shift = shift_of(x + s.x, std::min(whole.length - s.inside, to - from));
                });
            auto block = block_about<CENTRED>(at, from, to, shift);
            double first = block.first, apart = first / n, square = block.second - first * apart;
            moments = merge(moments, Moments<double>{n, block.shift + apart, square < 0 ? 0 : square});
            if (CENTRED) shift = A(block.shift + apart);
        }
        return moments;
    }

    template <bool CENTRED> Block<A> block_about(Place at, int64_t from, int64_t to, A shift) const {
        return block_of<A, CENTRED>(to - from, shift, range, [&](auto &sums, auto about) {
            walk(whole, at, from, to, [&](const Stretch &s) { sums.add(x + s.x, s.n, about); });
        });
    }

    Map<A> given(int64_t set) const {
        set %= statistics;
        return {call.center ? calm(call.center[set]) : A(0), call.inverse ? calm(call.inverse[set]) : A(1), 0};
    }

    // Keeps the statistics of a set.
    Map<A> map_of(int64_t set, const Moments<double> &moments) const {
        if (plan.given) return given(set);
        A high = A(moments.mean), inverse = inverse_scale<A>(plan, moments.square);
        if (call.inverse) call.inverse[set] = inverse;
        if (call.center) call.center[set] = high;
        if (call.variance) call.variance[set] = A(moments.square / moments.n);
        return {high, inverse, A(moments.mean - double(high)) * inverse};
    }

    void apply(int64_t set, Map<A> map, int64_t begin, int64_t end) const {
        if (call.y == nullptr) return;
        // Inlined by force: sets may be so small that a call for each counts.
        walk(runs, place_of(plan, runs, set), begin, end, [&](const Stretch &s) __attribute__((always_inline)) {
            const A *gain = along(call.weight, s.parameter), *bias = along(call.bias, s.parameter);
            Map<A> mine = map;
            if (!runs.vector) {
                if (gain) mine.inverse *= *gain, mine.low *= *gain;
                if (bias) mine.low -= *bias;
            }
            if (curved) return curve(x + s.x, call.y + s.x, s.n, mine, gain, bias);
            straight(x + s.x, call.y + s.x, s.n, mine.high, mine.inverse, mine.low, least, gain, bias, ahead);
        });
    }

    void curve(const T *from, T *y, int64_t n, Map<A> map, const A *gain, const A *bias) const {
        alignas(64) A mapped[PIECE];
        for (int64_t i = 0; i < n; i += PIECE) {
            int64_t m = std::min(PIECE, n - i), step = runs.vector ? i : 0;
            before_curve(from + i, mapped, m, map.high, map.inverse, map.low, least, along(gain, step), along(bias, step), ahead);
            activate_run<A>(plan.activation, mapped, m);
            auto value = [&](auto &&at) { return at(static_cast<const A *>(mapped)); };
            streamed ? fill_far<T>(y + i, m, value, [](int64_t) {}) : fill<T>(y + i, m, value, [](int64_t) {});
        }
    }
};

}  // namespace

template <class T> void segments_forward(const NkPlan &plan, const Forward<T> &call) { SegmentsForward<T>(plan, call).run(); }

#define MAKE(T) template void segments_forward<T>(const NkPlan &, const Forward<T> &);
NK_EACH_TYPE(MAKE)

}  // namespace nk
