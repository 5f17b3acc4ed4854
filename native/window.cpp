// Sums over windows of channels, and local response normalization by them, in tiles: all channels at some of the positions, so that what
// lies in a window is in the cache.
//
// The window of each element is summed by itself: a running sum would lose small windows behind large elements, and would carry a NaN to the end.
// Two ways through a tile:
//
//     at once     a workspace holds all channels, `width` elements apart, with channels of zeros on both sides: a window is elements
//                 `width` apart, wherever it lies. For channels last, few positions, and long windows.
//     by channel  rings of as many rows as the window has channels go along, and memory is read row after row. For channels first.
#include "responses.h"

#include <algorithm>
#include <cmath>

#include "room.h"
#include "row.h"
#include "typed.h"

namespace nk {
namespace {

// Elements that are finished at a time, and that a tile may have: its workspace stays in the second-level cache.
constexpr int64_t STRIP = 512, TILE = 16384;
// Elements that the rows of a ring may have together, and that a row should have at least.
constexpr int64_t RING = 8192, ROW = 8 * LANES;
// Longer windows are put together from sums of 1, 2, 4, ... neighbours.
constexpr int64_t LONG = 24;

// Pieces of a tile: `length` elements side by side in memory and in the workspace, `apart` elements between their starts in memory.
struct Pieces {
    int64_t number, length, apart;
};

struct Tile {
    int64_t start, width;
    Pieces pieces;
};

int64_t in_vectors(int64_t n) { return (n + 4 * LANES - 1) / (4 * LANES) * (4 * LANES); }

// How a tensor is cut into tiles. No sum depends on it, so it may depend on the threads.
struct Cut {
    const NkWindow &plan;
    const int64_t window = plan.before + 1 + plan.after;
    const bool by_channel = plan.inner >= ROW && window <= LONG;
    const int64_t most = by_channel ? along_channels() : std::min(plan.inner, in_vectors(TILE / plan.channels + 1));
    const int64_t tiles = (plan.inner + most - 1) / most;  // of one outer index

    Tile at(int64_t index) const {
        int64_t outer = index / tiles, from = index % tiles * most;
        int64_t width = std::min(most, plan.inner - from), start = outer * plan.channels * plan.inner + from;
        if (width == plan.inner) return {start, width, {1, plan.channels * width, 0}};
        return {start, width, {plan.channels, width, plan.inner}};
    }

  private:
    int64_t along_channels() const {
        int64_t fair = plan.inner * plan.outer / threads();
        int64_t fit = std::max(std::min({RING / window, 4 * STRIP, fair}), ROW), pieces = (plan.inner + fit - 1) / fit;
        return in_vectors((plan.inner + pieces - 1) / pieces);
    }
};

// each(memory, workspace, n) for strips of a tile.
template <class Each> void for_strips(const Pieces &pieces, Each &&each) {
    for (int64_t p = 0; p < pieces.number; ++p)
        for (int64_t e = 0; e < pieces.length; e += STRIP)
            each(p * pieces.apart + e, p * pieces.length + e, std::min(STRIP, pieces.length - e));
}

// sums[e] = values[e] + values[e + width] + ... of `window` terms. What is read and written may go up to 4 * LANES beyond n.
template <class A> void sum_short(const A *values, int64_t window, int64_t width, int64_t n, A *sums) {
    for (int64_t e = 0; e < n; e += 4 * LANES) {
        Vec<A> sum[4] = {};
        const A *from = values + e;
        for (int64_t w = 0; w < window; ++w, from += width)
            for (int v = 0; v < 4; ++v) sum[v] += load(from + v * LANES);
        for (int v = 0; v < 4; ++v) store(sums + e + v * LANES, sum[v]);
    }
}

// The same; spoils the values, of which there are n + (window - 1) * width.
template <class A> void sum_long(A *values, int64_t window, int64_t width, int64_t n, A *sums) {
    std::fill_n(sums, n, A(0));
    int64_t covered = 0;
    for (int64_t length = 1;; length *= 2) {  // values[e] is the sum of `length` terms
        if (window & length) {
            const A *from = values + covered * width;
            over(n, [&](auto at) { at.put(sums, at(sums) + at(from)); });
            covered += length;
        }
        if (2 * length > window) return;
        // Ascending, what is added has not been doubled yet.
        const A *next = values + length * width;
        int64_t left = n + (window - 2 * length) * width;
        over(left, [&](auto at) { at.put(values, at(values) + at(next)); });
    }
}

template <class A> void raise(A *__restrict values, int64_t n, A power) {
    if (power == A(0.75)) {
        for (int64_t e = 0; e < n; ++e) {
            A root = std::sqrt(values[e]);
            values[e] = 1 / (root * std::sqrt(root));
        }
    } else if (power == A(0.5)) {
        for (int64_t e = 0; e < n; ++e) values[e] = 1 / std::sqrt(values[e]);
    } else if (power == A(1)) {
        for (int64_t e = 0; e < n; ++e) values[e] = 1 / values[e];
    } else {
        for (int64_t e = 0; e < n; ++e) values[e] = std::pow(values[e], -power);
    }
}

template <class T> class Worker {
    using A = accumulator<T>;
    const NkWindow &plan;
    const bool by_channel;
    const int64_t window;
    const A offset, factor, power;
    Room<A> room;
    A *taken, *sums, *strip, *powers, *terms, *weighted;

  public:
    Worker(const Cut &cut, bool backward)
        : plan(cut.plan), by_channel(cut.by_channel), window(cut.window), offset(A(plan.offset)), factor(A(plan.factor)),
          power(A(plan.power)) {
        constexpr int64_t beyond = 4 * LANES, short_strip = STRIP + beyond;
        int64_t channels = by_channel ? 1 : plan.channels;  // of a ring, beside the window's others
        int64_t padded = (channels + window - 1) * cut.most + beyond, inside = by_channel ? padded : channels * cut.most + beyond;
        int64_t whole = window > LONG ? inside : 0;
        taken = room.take(padded + whole + 2 * short_strip + (backward ? padded + inside : 0));
        sums = taken + padded;
        strip = sums + whole;
        powers = strip + short_strip;
        terms = powers + short_strip;
        weighted = terms + (backward ? padded : 0);
    }

    // y is what x is divided to, or the sum of x over the window.
    template <bool SUM> void forward(const Tile &tile, const void *of_x, void *of_y) {
        const T *x = static_cast<const T *>(of_x) + tile.start;
        T *y = static_cast<T *>(of_y) + tile.start;
        if (by_channel) return forward_by_channel<SUM>(tile.width, x, y);
        take_all<!SUM>(tile, x);
        for_strips(tile.pieces, [&](int64_t at, int64_t f, int64_t n) {
            sum_windows(taken, tile.width, f, n);
            finish<SUM>(x + at, n, y + at);
        });
    }

    // dx_j = dy_j / s_j^power - 2 factor power x_j * (dy_i x_i / s_i^(power + 1) summed over those i whose window has j).
    void backward(const Tile &tile, const void *of_dy, const void *of_x, void *of_dx) {
        const T *dy = static_cast<const T *>(of_dy) + tile.start, *x = static_cast<const T *>(of_x) + tile.start;
        T *dx = static_cast<T *>(of_dx) + tile.start;
        if (by_channel) return backward_by_channel(tile.width, dy, x, dx);
        take_all<true>(tile, x);
        clear(terms, plan.after, plan.before, tile.width);
        A *inside = terms + plan.after * tile.width;
        for_strips(tile.pieces, [&](int64_t at, int64_t f, int64_t n) {
            sum_windows(taken, tile.width, f, n);
            energies(n);
            weigh(dy + at, x + at, n, weighted + f, inside + f);
        });
        if (window > LONG) sum_long(terms, window, tile.width, plan.channels * tile.width, sums);
        for_strips(tile.pieces, [&](int64_t at, int64_t f, int64_t n) {
            sum_windows(terms, tile.width, f, n);
            join(weighted + f, x + at, n, dx + at);
        });
    }

  private:
    // A ring's rows hold the channels of one window, the last of them at row c % window: their sum needs no order.
    template <bool SUM> void forward_by_channel(int64_t width, const T *x, T *y) {
        std::fill_n(taken, window * width, A(0));
        for (int64_t c = 0; c < plan.channels + plan.after; ++c) {
            take_row<!SUM>(c, width, x);
            int64_t done = c - plan.after;
            if (done < 0) continue;
            for_strips({1, width, 0}, [&](int64_t e, int64_t, int64_t n) {
                sum_short(taken + e, window, width, n, strip);
                finish<SUM>(x + done * plan.inner + e, n, y + done * plan.inner + e);
            });
        }
    }

    void backward_by_channel(int64_t width, const T *dy, const T *x, T *dx) {
        std::fill_n(taken, window * width, A(0));
        std::fill_n(terms, window * width, A(0));
        for (int64_t c = 0; c < plan.channels + plan.after + plan.before; ++c) {
            take_row<true>(c, width, x);
            int64_t next = c - plan.after, done = next - plan.before;
            if (next < 0) continue;
            int64_t row = next % window * width, from = next * plan.inner, to = done * plan.inner;
            if (next >= plan.channels) std::fill_n(terms + row, width, A(0));
            for_strips({1, width, 0}, [&](int64_t e, int64_t, int64_t n) {
                if (next < plan.channels) {
                    sum_short(taken + e, window, width, n, strip);
                    energies(n);
                    weigh(dy + from + e, x + from + e, n, weighted + row + e, terms + row + e);
                }
                if (done < 0) return;
                sum_short(terms + e, window, width, n, strip);
                join(weighted + done % window * width + e, x + to + e, n, dx + to + e);
            });
        }
    }

    template <bool SQUARED> static Vec<A> of(Vec<A> v) { return SQUARED ? v * v : v; }

    template <bool SQUARED> void take_row(int64_t c, int64_t width, const T *x) {
        A *row = taken + c % window * width;
        if (c >= plan.channels) {
            std::fill_n(row, width, A(0));
            return;
        }
        over(width, [&](auto at) { at.put(row, of<SQUARED>(at(x + c * plan.inner))); });
    }

    // strip = the sums over the windows of n elements from f on; those of long windows are there already.
    void sum_windows(const A *values, int64_t width, int64_t f, int64_t n) {
        if (window > LONG) std::copy_n(sums + f, n, strip);
        else sum_short(values + f, window, width, n, strip);
    }

    void energies(int64_t n) {
        for (int64_t e = 0; e < n; ++e) strip[e] = offset + factor * strip[e];
    }

    template <bool SUM> void finish(const T *x, int64_t n, T *y) {
        if constexpr (SUM) {
            over(n, [&](auto at) { at.put(y, at(strip)); });
            return;
        }
        energies(n);
        raise(strip, n, power);
        over(n, [&](auto at) { at.put(y, at(x) * at(strip)); });
    }

    void weigh(const T *dy, const T *x, int64_t n, A *whole, A *term) {
        std::copy_n(strip, n, powers);
        raise(powers, n, power);
        over(n, [&](auto at) {
            Vec<A> found = at(dy) * at(powers);
            at.put(whole, found);
            at.put(term, found * at(x) / at(strip));
        });
    }

    void join(const A *whole, const T *x, int64_t n, T *dx) {
        const Vec<A> steep = splat(2 * factor * power);
        over(n, [&](auto at) { at.put(dx, at(whole) - steep * at(x) * at(strip)); });
    }

    void clear(A *values, int64_t front, int64_t back, int64_t width) {
        std::fill_n(values, front * width, A(0));
        std::fill_n(values + (front + plan.channels) * width, back * width + 4 * LANES, A(0));
    }

    template <bool SQUARED> void take_all(const Tile &tile, const T *x) {
        clear(taken, plan.before, plan.after, tile.width);
        A *inside = taken + plan.before * tile.width;
        const Pieces &pieces = tile.pieces;
        for (int64_t p = 0; p < pieces.number; ++p)
            over(pieces.length, [&](auto at) { at.put(inside + p * pieces.length, of<SQUARED>(at(x + p * pieces.apart))); });
        if (window > LONG) sum_long(taken, window, tile.width, plan.channels * tile.width, sums);
    }
};

// each(worker, tile) on all threads, the worker of the plan's type.
template <class Each, class... P> NkStatus for_tiles(const NkWindow &plan, bool backward, Each &&each, const P *...pointers) {
    return enter(plan.type, plan.outer * plan.channels * plan.inner, [&](auto t) {
        const Cut cut{plan};
        int64_t tiles = plan.outer * cut.tiles, together = std::max<int64_t>(TILE / (plan.channels * cut.most), 1);
        for_ranges((tiles + together - 1) / together, [&](int64_t begin, int64_t end) {
            Worker<decltype(t)> worker(cut, backward);
            for (int64_t i = begin * together; i < std::min(end * together, tiles); ++i) each(worker, cut.at(i));
        });
    }, pointers...);
}

}  // namespace
}  // namespace nk

// All pointers are to outer * channels * inner elements of the plan's type.
NK_EXPORT int32_t nk_window_forward(const NkWindow *plan, const void *x, void *y) {
    return nk::for_tiles(*plan, false, [&](auto &worker, auto &&tile) { worker.template forward<false>(tile, x, y); }, x, y);
}

// y = x summed over the window, whatever else the plan says. Its own backward pass, with before and after exchanged.
NK_EXPORT int32_t nk_window_sum(const NkWindow *plan, const void *x, void *y) {
    return nk::for_tiles(*plan, false, [&](auto &worker, auto &&tile) { worker.template forward<true>(tile, x, y); }, x, y);
}

NK_EXPORT int32_t nk_window_backward(const NkWindow *plan, const void *dy, const void *x, void *dx) {
    return nk::for_tiles(*plan, true, [&](auto &worker, auto &&tile) { worker.backward(tile, dy, x, dx); }, dy, x, dx);
}
