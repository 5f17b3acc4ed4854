// Memory beyond the cache: stores past it, and fetches ahead of it.
#pragma once
#include <cstdint>
#include <cstring>

#include "vector.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace nk {

// A store past the cache spares the fetch of a line that is written whole. The address is a multiple of the size.
template <int SIZE> inline __attribute__((always_inline)) void stream_bytes(void *to, const void *from) {
    char *p = static_cast<char *>(to);
    const char *packed = static_cast<const char *>(from);
#if defined(__AVX512F__)
    if constexpr (SIZE >= 64) {
        for (int i = 0; i < SIZE; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i *>(p + i), _mm512_load_si512(packed + i));
        return;
    }
#endif
#if defined(__AVX__)
    if constexpr (SIZE >= 32) {
        for (int i = 0; i < SIZE; i += 32)
            _mm256_stream_si256(reinterpret_cast<__m256i *>(p + i), _mm256_load_si256(reinterpret_cast<const __m256i *>(packed + i)));
        return;
    }
#endif
#if defined(__SSE2__)
    if constexpr (SIZE >= 16) {
        for (int i = 0; i < SIZE; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i *>(p + i), _mm_load_si128(reinterpret_cast<const __m128i *>(packed + i)));
        return;
    }
#endif
    std::memcpy(p, packed, SIZE);
}

template <class T> inline __attribute__((always_inline)) void stream(T *p, Vec<accumulator<T>> v) {
    alignas(64) T packed[LANES];
    store(packed, v);
    stream_bytes<LANES * int(sizeof(T))>(p, packed);
}

constexpr int64_t LINE = 64;  // bytes

// The elements from p to the next line.
template <class T> inline int64_t until_line(const T *p) {
    return int64_t(-reinterpret_cast<std::uintptr_t>(p) % std::uintptr_t(LINE)) / int64_t(sizeof(T));
}
template <class T> inline bool on_element(const T *p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(T) == 0; }

// Before other threads read what this one has streamed.
inline void end_of_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Asks for N elements that are read soon: while one set is written, the next one can be on its way.
template <int N, class T> inline __attribute__((always_inline)) void fetch(const T *p) {
    for (int i = 0; i < N; i += int(64 / sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

}  // namespace nk
