// Room for intermediate results.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace nk {

// n elements with arbitrary contents. Up to SMALL they lie inside the object, as an allocation takes longer than a kernel on a small input.
template <class A, int64_t SMALL = 512> class Room {
    alignas(64) A small[SMALL];
    std::unique_ptr<A[]> large;

  public:
    Room() {}
    Room(const Room &) = delete;
    A *take(int64_t n) {
        if (n <= SMALL) return small;
        large.reset(new A[std::size_t(n)]);
        return large.get();
    }
};

}  // namespace nk
