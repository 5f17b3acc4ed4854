// Calls a library of kernels with what nobody thinks of, and compares with plain loops; the sanitizers that it is built with end it where
// it touches memory that is not its own.
//
//     fuzz LIBRARY BASELINE LEVEL [CASES [SEED]]     ends with 77 where the processor's level is lower
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <thread>

#include "fuzz.h"

namespace fuzz {
namespace {

void *library = nullptr;
int team = 1;
Failure fails = NEVER;

struct Entry {
    const char *name;
    void (*one_case)(Random &);
};
std::vector<Entry> &entries() {
    static std::vector<Entry> all;
    return all;
}

// As torch cuts a range: equal pieces, one a thread.
int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context) {
    if (fails == AT_ONCE) return 1;
    int64_t piece = std::max((end - begin + team - 1) / team, grain);
    if (fails == HALF_WAY) {
        body(begin, std::min(begin + piece, end), context);
        return 1;
    }
    std::vector<std::thread> others;
    for (int64_t from = begin + piece; from < end; from += piece) others.emplace_back(body, from, std::min(from + piece, end), context);
    body(begin, std::min(begin + piece, end), context);
    for (std::thread &other : others) other.join();
    return 0;
}

int32_t num_threads(uint32_t *count) {
    *count = uint32_t(team);
    return 0;
}

double half_value(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
    return bits & 0x8000 ? -size : size;
}

uint16_t half_bits(double value) {
    uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return sign | 0x7e00;
    value = std::fabs(value);
    if (value == 0) return sign;
    if (std::isinf(value)) return sign | 0x7c00;
    int exponent = std::max(std::ilogb(value), -14);
    int64_t bits = (exponent + 14) * 1024 + int64_t(std::nearbyint(std::ldexp(value, 10 - exponent)));
    return uint16_t(sign | std::min<int64_t>(bits, 0x7c00));
}

template <class T> T read(const unsigned char *from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
template <class T> void write(unsigned char *to, T value) { std::memcpy(to, &value, sizeof value); }

}  // namespace

void *symbol(const char *name) {
    void *found = dlsym(library, name);
    if (found == nullptr) throw Mismatch(std::string("the library has no ") + name);
    return found;
}

void use_threads(int count, Failure failure) {
    team = count;
    fails = failure;
    auto set = function<void(void *, void *)>("nk_set_threads");
    if (count == 1) set(nullptr, nullptr);
    else set(reinterpret_cast<void *>(&parallel_for), reinterpret_cast<void *>(&num_threads));
}

Fuzzer::Fuzzer(const char *name, void (*one_case)(Random &)) { entries().push_back({name, one_case}); }

double Buffer::operator[](int64_t i) const {
    const unsigned char *at = memory.data() + i * bytes_of(type);
    switch (type) {
        case NK_FLOAT64: return read<double>(at);
        case NK_FLOAT32: return read<float>(at);
        case NK_FLOAT16: return half_value(read<uint16_t>(at));
        default: {
            uint32_t bits = uint32_t(read<uint16_t>(at)) << 16;
            float value;
            std::memcpy(&value, &bits, 4);
            return value;
        }
    }
}

void Buffer::set(int64_t i, double value) {
    unsigned char *at = memory.data() + i * bytes_of(type);
    switch (type) {
        case NK_FLOAT64: return write(at, value);
        case NK_FLOAT32: return write(at, float(value));
        case NK_FLOAT16: return write(at, half_bits(value));
        default: {
            float narrow = float(value);
            uint32_t bits;
            std::memcpy(&bits, &narrow, 4);
            bool number = narrow == narrow;
            return write(at, uint16_t(number ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0));
        }
    }
}

}  // namespace fuzz

int main(int count, char **words) {
    if (count < 4) {
        std::fprintf(stderr, "usage: %s LIBRARY BASELINE LEVEL [CASES [SEED]]\n", words[0]);
        return 2;
    }
    void *baseline = dlopen(words[2], RTLD_NOW | RTLD_LOCAL);
    auto level = baseline ? reinterpret_cast<int (*)()>(dlsym(baseline, "nk_level")) : nullptr;
    if (level == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    if (level() < std::atoi(words[3])) return 77;
    fuzz::library = dlopen(words[1], RTLD_NOW | RTLD_LOCAL);
    if (fuzz::library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 2;
    }
    int64_t cases = count > 4 ? std::atoll(words[4]) : 2000, seed = count > 5 ? std::atoll(words[5]) : 0;
    for (const fuzz::Entry &entry : fuzz::entries()) {
        for (int64_t i = 0; i < cases; ++i) {
            std::seed_seq both{seed, i};
            fuzz::Random random{std::mt19937_64(both)};
            try {
                entry.one_case(random);
            } catch (const fuzz::Mismatch &mismatch) {
                std::fprintf(stderr, "%s, seed %lld, case %lld: %s\n", entry.name, (long long)seed, (long long)i, mismatch.what());
                return 1;
            }
        }
        std::printf("%s: %lld cases\n", entry.name, (long long)cases);
    }
    return 0;
}
