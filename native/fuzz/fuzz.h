// What the fuzzers share: random numbers, buffers that end where they end, and comparison with plain double loops.
//
// A fuzzer is a function that makes up one call of the library, and throws Mismatch where the answer is wrong; it registers itself:
//
//     const Fuzzer entry{"nest", one_case};
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../plan.h"

namespace fuzz {

struct Mismatch : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Random {
    std::mt19937_64 engine;
    int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
    bool chance(double p) { return std::uniform_real_distribution<double>()(engine) < p; }
    double normal() { return std::normal_distribution<double>()(engine); }
    template <class T> T pick(std::initializer_list<T> of) { return of.begin()[below(int64_t(of.size()))]; }
};

// The library under test, by the names of its functions.
void *symbol(const char *name);
template <class F> F *function(const char *name) { return reinterpret_cast<F *>(symbol(name)); }

// How many threads the library is given for the calls that follow; they may fail before they begin, or after the first piece.
enum Failure { NEVER, AT_ONCE, HALF_WAY };
void use_threads(int count, Failure failure = NEVER);

struct Fuzzer {
    Fuzzer(const char *name, void (*one_case)(Random &));
};

inline int64_t bytes_of(int32_t type) { return type == NK_FLOAT64 ? 8 : type == NK_FLOAT32 ? 4 : 2; }
// The type that statistics of a type are kept in.
inline int32_t wide(int32_t type) { return type == NK_FLOAT64 ? NK_FLOAT64 : NK_FLOAT32; }
// Half of the distance to the next number, relative.
inline double rounding(int32_t type) {
    return type == NK_FLOAT64 ? 0x1p-53 : type == NK_FLOAT32 ? 0x1p-24 : type == NK_FLOAT16 ? 0x1p-11 : 0x1p-8;
}

// Elements of one type on the heap without room to spare, so that the sanitizer sees every access next to them; may be absent, as a null pointer.
class Buffer {
  public:
    Buffer() = default;
    Buffer(int32_t type, int64_t n) : type(type), n(n), memory(std::size_t(n * bytes_of(type)), 0xff), there(true) {}
    static Buffer normal(Random &random, int32_t type, int64_t n, double shift = 0, double scale = 1) {
        Buffer made(type, n);
        for (int64_t i = 0; i < n; ++i) made.set(i, shift + scale * random.normal());
        return made;
    }
    explicit operator bool() const { return there; }
    void *data() { return there ? memory.data() : nullptr; }
    int64_t size() const { return n; }
    bool operator==(const Buffer &other) const { return memory == other.memory; }
    double operator[](int64_t i) const;
    void set(int64_t i, double value);

    int32_t type = NK_FLOAT32;

  private:
    int64_t n = 0;
    std::vector<unsigned char> memory;
    bool there = false;
};

// Throws unless got[i] is want within `loose` times the sum of what was added up for it, and the rounding of its type.
inline void expect(const char *what, const Buffer &got, int64_t i, double want, double magnitude, double loose) {
    double found = got[i];
    if (std::isnan(want) ? std::isnan(found) : found == want) return;
    double room = loose * magnitude + 2 * rounding(got.type) * std::fabs(want) + (got.type == NK_FLOAT16 ? 0x1p-24 : 1e-37);
    if (got.type == NK_FLOAT16 && std::fabs(want) + room > 65000) return;  // overflows, or nearly
    if (std::fabs(found - want) <= room) return;
    std::ostringstream said;
    said.precision(10);
    said << what << '[' << i << "] is " << found << ", wanted " << want << " within " << room;
    throw Mismatch(said.str());
}

template <class F> void answers(F &&status) {
    if (int32_t got = status()) throw Mismatch("status " + std::to_string(got));
}

// Wants a status, and outputs that are left alone.
template <class Call> void refused(const char *what, int32_t want, Call &&call, const std::vector<Buffer *> &outputs) {
    std::vector<Buffer> before;
    for (Buffer *output : outputs) before.push_back(*output);
    if (int32_t got = call(); got != want) throw Mismatch(std::string(what) + ": status " + std::to_string(got));
    for (std::size_t i = 0; i < outputs.size(); ++i)
        if (!(*outputs[i] == before[i])) throw Mismatch(std::string(what) + ": output " + std::to_string(i) + " was written");
}

// Calls with one thread and with several, and wants the same bits from both.
template <class Call> void on_any_threads(Random &random, Call &&call, const std::vector<Buffer *> &outputs) {
    use_threads(1);
    answers(call);
    std::vector<Buffer> alone;
    for (Buffer *output : outputs) alone.push_back(*output);
    use_threads(int(2 + random.below(4)));
    answers(call);
    for (std::size_t i = 0; i < outputs.size(); ++i)
        if (!(*outputs[i] == alone[i])) throw Mismatch("output " + std::to_string(i) + " depends on the number of threads");
}

}  // namespace fuzz
