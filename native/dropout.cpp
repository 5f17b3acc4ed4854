// Dropout by a counter-based generator: whether an element is kept depends on the seed and the element's place alone, so that the backward
// pass draws again what the forward pass drew, and nothing is stored.
#include "row.h"
#include "threads.h"
#include "typed.h"

namespace nk {
namespace {

constexpr int64_t WIDE = 32, DRAWN = 2 * WIDE, BLOCKS = 256;  // counters side by side; numbers they give; their blocks in a task

// Threefry 2x32 of 13 rounds (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). Unlike their Philox it needs
// no high halves of products, which are slow in vectors.
void draw(uint64_t seed, int64_t block, uint32_t *numbers) {
    constexpr int turns[] = {13, 15, 26, 6, 17, 29, 16, 24};
    const uint32_t low = uint32_t(seed), high = uint32_t(seed >> 32), keys[] = {low, high, low ^ high ^ 0x1BD11BDA};
    for (int64_t lane = 0; lane < WIDE; ++lane) {
        uint64_t counter = uint64_t(block * WIDE + lane);
        uint32_t a = uint32_t(counter) + low, b = uint32_t(counter >> 32) + high;
#pragma GCC unroll 13
        for (int round = 0; round < 13; ++round) {
            a += b, b = (b << turns[round % 8] | b >> (32 - turns[round % 8])) ^ a;
            if (round % 4 == 3) a += keys[(round / 4 + 1) % 3], b += keys[(round / 4 + 2) % 3] + uint32_t(round / 4 + 1);
        }
        numbers[lane] = a, numbers[lane + WIDE] = b;
    }
}

template <class T> void drop(int64_t n, uint64_t seed, double p, const T *x, T *y) {
    using A = accumulator<T>;
    const uint32_t least = uint32_t(p * 0x1p32);
    const A scale = A(1 / (1 - p));
    for_each((n + DRAWN * BLOCKS - 1) / (DRAWN * BLOCKS), [&](int64_t task) {
        for (int64_t begin = task * DRAWN * BLOCKS, end = begin + DRAWN * BLOCKS; begin < end && begin < n; begin += DRAWN) {
            uint32_t numbers[DRAWN];
            draw(seed, begin / DRAWN, numbers);
            alignas(64) A factors[DRAWN];
            for (int64_t i = 0; i < DRAWN; ++i) factors[i] = numbers[i] < least ? A(0) : scale;
            over(n - begin < DRAWN ? n - begin : DRAWN, [&](auto at) { at.put(y + begin, at(x + begin) * at(factors)); });
        }
    });
}

}  // namespace
}  // namespace nk

// y = x / (1 - p) where kept, else 0; of n elements.
NK_EXPORT int32_t nk_dropout(int64_t type, int64_t n, int64_t seed, double p, const void *x, void *y) {
    return nk::enter(int32_t(type), n, [&](auto t) {
        using T = decltype(t);
        nk::drop<T>(n, uint64_t(seed), p, static_cast<const T *>(x), static_cast<T *>(y));
    }, x, y);
}
