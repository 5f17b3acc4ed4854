// The gate of a gated norm, x * silu(z), and its gradients, in one pass each. x or y may be wider than z: what is between gate and norm is.
#include "activation.h"
#include "row.h"
#include "threads.h"
#include "typed.h"

namespace nk {
namespace {

// over(at) the vectors of n elements, in pieces; X and Y, the types of x and y, as values.
template <class T, class Each> void each_vector(int64_t wide, int64_t n, Each &&each) {
    constexpr int64_t piece = 1 << 14;
    auto go = [&](auto of_x, auto of_y) {
        for_each((n + piece - 1) / piece, [&](int64_t task) {
            int64_t begin = task * piece;
            over(std::min(piece, n - begin), [&](auto at) { each(at, begin, of_x, of_y); });
        });
    };
    if (wide == NK_WIDE_X) go(accumulator<T>{}, T{});
    else if (wide == NK_WIDE_Y) go(T{}, accumulator<T>{});
    else go(T{}, T{});
}
template <class X> const X *in(const void *p, int64_t begin) { return static_cast<const X *>(p) + begin; }
template <class X> X *out(void *p, int64_t begin) { return static_cast<X *>(p) + begin; }

}  // namespace
}  // namespace nk

NK_EXPORT int32_t nk_gate(int64_t type, int64_t wide, int64_t n, const void *x, const void *z, void *y) {
    using namespace nk;
    return enter(int32_t(type), n, [&](auto t) {
        using T = decltype(t);
        each_vector<T>(wide, n, [&](auto at, int64_t begin, auto of_x, auto of_y) {
            auto open = activate<NK_SILU, accumulator<T>>(at(in<T>(z, begin)));
            at.put(out<decltype(of_y)>(y, begin), at(in<decltype(of_x)>(x, begin)) * open);
        });
    }, x, z, y);
}

NK_EXPORT int32_t nk_gate_backward(int64_t type, int64_t wide, int64_t n, const void *dy, const void *x, const void *z, void *dx, void *dz) {
    using namespace nk;
    return enter(int32_t(type), n, [&](auto t) {
        using T = decltype(t);
        using A = accumulator<T>;
        each_vector<T>(wide, n, [&](auto at, int64_t begin, auto of_x, auto of_y) {
            Vec<A> d = at(in<decltype(of_y)>(dy, begin)), gate = at(in<T>(z, begin)), factor = at(in<decltype(of_x)>(x, begin));
            at.put(out<T>(dz, begin), d * factor * slope<NK_SILU, A>(gate));
            at.put(out<decltype(of_x)>(dx, begin), d * activate<NK_SILU, A>(gate));
        });
    }, dy, x, z, dx, dz);
}
