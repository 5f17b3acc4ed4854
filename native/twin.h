// Two vectors at once: 2 * LANES elements that lie next to one another, in the order in which the instructions widen and narrow them best.
//
// Halves of 128 bits are widened apart, so that bfloat16 comes as elements 0-3, 8-11, ... and 4-7, 12-15, ...; parameters and their
// gradients, which go with them in the accumulation type, are brought into the same order.
#pragma once
#include <algorithm>
#include <limits>

#include "stream.h"
#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace nk {

template <class A> struct Twin {
    Vec<A> a, b;

    Twin &operator+=(const Twin &other) { return *this = *this + other; }
    friend Twin operator+(const Twin &x, const Twin &y) { return {x.a + y.a, x.b + y.b}; }
    friend Twin operator-(const Twin &x, const Twin &y) { return {x.a - y.a, x.b - y.b}; }
    friend Twin operator*(const Twin &x, const Twin &y) { return {x.a * y.a, x.b * y.b}; }
    friend Twin operator+(const Twin &x, Vec<A> y) { return {x.a + y, x.b + y}; }
    friend Twin operator-(const Twin &x, Vec<A> y) { return {x.a - y, x.b - y}; }
    friend Twin operator*(const Twin &x, Vec<A> y) { return {x.a * y, x.b * y}; }
};

// The larger one, or a NaN of v.
inline lanes::F32 at_least(lanes::F32 v, lanes::F32 least) { return select<float>(v < least, least, v); }
inline lanes::F64 at_least(lanes::F64 v, lanes::F64 least) { return select<double>(v < least, least, v); }
template <class A> inline Twin<A> at_least(const Twin<A> &v, Vec<A> least) { return {at_least(v.a, least), at_least(v.b, least)}; }

// v, or 0 where z is not positive.
inline lanes::F32 where_positive(lanes::F32 z, lanes::F32 v) { return select<float>(z <= 0, lanes::F32{}, v); }
inline lanes::F64 where_positive(lanes::F64 z, lanes::F64 v) { return select<double>(z <= 0, lanes::F64{}, v); }
template <class A> inline Twin<A> where_positive(const Twin<A> &z, const Twin<A> &v) {
    return {where_positive(z.a, v.a), where_positive(z.b, v.b)};
}

// Whether the order of T is another than that in memory.
template <class T> constexpr bool reordered = false;
#if defined(__AVX2__)
template <> constexpr bool reordered<bfloat16> = true;
#endif

// T says in which order; P is T, or the accumulation type that goes with it.
template <class T, class P> struct TwinOf {
    using A = accumulator<T>;
    static Twin<A> load(const P *p) { return {nk::load(p), nk::load(p + LANES)}; }
    static void store(P *p, const Twin<A> &v) {
        nk::store(p, v.a);
        nk::store(p + LANES, v.b);
    }
};

#if defined(__AVX2__)
template <> struct TwinOf<bfloat16, bfloat16> {
#if defined(__AVX512F__)
    using Register = __m512i;
    static Register unpack_low(Register v) { return _mm512_unpacklo_epi16(Register{}, v); }
    static Register unpack_high(Register v) { return _mm512_unpackhi_epi16(Register{}, v); }
    static Register pack(Register a, Register b) { return _mm512_packus_epi32(a, b); }
#else
    using Register = __m256i;
    static Register unpack_low(Register v) { return _mm256_unpacklo_epi16(Register{}, v); }
    static Register unpack_high(Register v) { return _mm256_unpackhi_epi16(Register{}, v); }
    static Register pack(Register a, Register b) { return _mm256_packus_epi32(a, b); }
#endif
    static Twin<float> load(const bfloat16 *p) {
        Register v;
        std::memcpy(&v, p, sizeof v);
        return {reinterpret_cast<lanes::F32>(unpack_low(v)), reinterpret_cast<lanes::F32>(unpack_high(v))};
    }
    // Of the NaNs only wild ones are rounded to zero; see calm().
    static Register rounded(lanes::F32 v) {
        lanes::U32 bits = reinterpret_cast<lanes::U32>(v);
        return reinterpret_cast<Register>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    static void store(bfloat16 *p, const Twin<float> &v) {
        Register packed = pack(rounded(v.a), rounded(v.b));
        std::memcpy(p, &packed, sizeof packed);
    }
};

template <> struct TwinOf<float16, float16> {
    static Twin<float> load(const float16 *p) { return {nk::load(p), nk::load(p + LANES)}; }
    static void store(float16 *p, const Twin<float> &v) {
#if defined(__AVX512F__)
        __m256i a = _mm512_cvtps_ph(reinterpret_cast<__m512>(v.a), _MM_FROUND_TO_NEAREST_INT);
        __m256i b = _mm512_cvtps_ph(reinterpret_cast<__m512>(v.b), _MM_FROUND_TO_NEAREST_INT);
        _mm512_storeu_si512(p, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
#else
        __m128i a = _mm256_cvtps_ph(reinterpret_cast<__m256>(v.a), _MM_FROUND_TO_NEAREST_INT);
        __m128i b = _mm256_cvtps_ph(reinterpret_cast<__m256>(v.b), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_set_m128i(b, a));
#endif
    }
};

template <> struct TwinOf<bfloat16, float> {
    static Twin<float> load(const float *p) {
#if defined(__AVX512F__)
        __m512 x = _mm512_loadu_ps(p), y = _mm512_loadu_ps(p + LANES);
        return {_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd)};
#else
        __m256 x = _mm256_loadu_ps(p), y = _mm256_loadu_ps(p + LANES);
        return {_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)};
#endif
    }
    static void store(float *p, const Twin<float> &v) {
#if defined(__AVX512F__)
        __m512 x = _mm512_shuffle_f32x4(v.a, v.b, 0x44), y = _mm512_shuffle_f32x4(v.a, v.b, 0xee);
        _mm512_storeu_ps(p, _mm512_shuffle_f32x4(x, x, 0xd8));
        _mm512_storeu_ps(p + LANES, _mm512_shuffle_f32x4(y, y, 0xd8));
#else
        _mm256_storeu_ps(p, _mm256_permute2f128_ps(v.a, v.b, 0x20));
        _mm256_storeu_ps(p + LANES, _mm256_permute2f128_ps(v.a, v.b, 0x31));
#endif
    }
};
#endif

// Parameters that are read often can be brought into the order of T beforehand: `to` holds twins of them as one vector after the other.
template <class T, class A> inline void arrange(const A *from, A *to, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) TwinOf<A, A>::store(to + i, TwinOf<T, A>::load(from + i));
    for (; i < n; ++i) to[i] = from[i];
}
// And back, in place.
template <class T, class A> inline void rearrange(A *values, int64_t n) {
    if constexpr (!reordered<T>) return;
    for (int64_t i = 0; i + 2 * LANES <= n; i += 2 * LANES) TwinOf<T, A>::store(values + i, TwinOf<A, A>::load(values + i));
}

template <class T, class P> inline Twin<accumulator<T>> load_twin(const P *p) { return TwinOf<T, P>::load(p); }
template <class T, class P> inline void store_twin(P *p, const Twin<accumulator<T>> &v) { TwinOf<T, P>::store(p, v); }

// A float's NaN whose highest bits are all ones and lower ones not all zero would carry over, rounded to bfloat16 as other numbers are. No
// instruction makes one, and none comes out of bfloat16; parameters and statistics from outside are calmed before they are used.
inline float calm(float v) { return v != v ? std::numeric_limits<float>::quiet_NaN() : v; }
inline double calm(double v) { return v; }
// Whether none of the values needs it to be rounded to T.
template <class T, class A> inline bool all_calm(const A *values, int64_t n) {
    uint32_t highest = 0;
    for (int64_t i = 0; reordered<T> && i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        highest = std::max(highest, bits & 0x7fffffffu);
    }
    return highest <= 0x7fff0000u;
}

// Past the cache, to a multiple of the size.
template <class T> inline void stream_twin(T *p, const Twin<accumulator<T>> &v) {
    alignas(64) T packed[2 * LANES];
    store_twin<T>(packed, v);
    stream_bytes<2 * LANES * int(sizeof(T))>(p, packed);
}

}  // namespace nk
