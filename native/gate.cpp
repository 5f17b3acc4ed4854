// The gate of a gated norm, x * silu(z), and its gradients, in one pass each. x and y may be wider than z: what is between gate and norm is.
#include "activation.h"
#include "row.h"
#include "threads.h"
#include "typed.h"

namespace nk {
namespace {

// run(begin, count) for the pieces of n elements.
template <class Run> void in_pieces(int64_t n, Run &&run) {
    constexpr int64_t piece = 1 << 14;
    for_each((n + piece - 1) / piece, [&](int64_t task) { run(task * piece, std::min(piece, n - task * piece)); });
}

// run(X{}, Y{}) for the types of x and y.
template <class T, class Run> void by_width(int32_t wide, Run &&run) {
    using A = accumulator<T>;
    if (wide == NK_WIDE_X) run(A{}, T{});
    else if (wide == NK_WIDE_Y) run(T{}, A{});
    else run(T{}, T{});
}

}  // namespace
}  // namespace nk

NK_EXPORT int32_t nk_gate(int64_t type, int64_t wide, int64_t n, const void *x, const void *z, void *y) {
    using namespace nk;
    return guarded([&]() -> NkStatus {
        if (any_null(x, z, y)) return NK_NULL;
        return by_type(int32_t(type), [&](auto t) {
            using T = decltype(t);
            by_width<T>(int32_t(wide), [&](auto of_x, auto of_y) {
                auto *in = static_cast<const decltype(of_x) *>(x);
                auto *gate = static_cast<const T *>(z);
                auto *out = static_cast<decltype(of_y) *>(y);
                in_pieces(n, [&](int64_t begin, int64_t count) {
                    over(count, [&](auto at) { at.put(out + begin, at(in + begin) * activate<NK_SILU, accumulator<T>>(at(gate + begin))); });
                });
            });
        });
    });
}

NK_EXPORT int32_t nk_gate_backward(int64_t type, int64_t wide, int64_t n, const void *dy, const void *x, const void *z, void *dx, void *dz) {
    using namespace nk;
    return guarded([&]() -> NkStatus {
        if (any_null(dy, x, z) || any_null(dx, dz)) return NK_NULL;
        return by_type(int32_t(type), [&](auto t) {
            using T = decltype(t);
            using A = accumulator<T>;
            by_width<T>(int32_t(wide), [&](auto of_x, auto of_y) {
                auto *g = static_cast<const decltype(of_y) *>(dy);
                auto *in = static_cast<const decltype(of_x) *>(x);
                auto *gate = static_cast<const T *>(z);
                auto *to_x = static_cast<decltype(of_x) *>(dx);
                auto *to_z = static_cast<T *>(dz);
                in_pieces(n, [&](int64_t begin, int64_t count) {
                    over(count, [&](auto at) {
                        Vec<A> d = at(g + begin), open = at(gate + begin), slope = nk::slope<NK_SILU, A>(open);
                        at.put(to_z + begin, d * at(in + begin) * slope);
                        at.put(to_x + begin, d * activate<NK_SILU, A>(open));
                    });
                });
            });
        });
    });
}
