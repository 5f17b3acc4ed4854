// Vectors of the compiler's own extension, in the width of the instruction set that this file is compiled for.
//
// Vec<float> and Vec<double> have the same number of lanes, so that one source serves both; load and store convert between memory and the
// accumulation type: float for float, bfloat16 and float16, double for double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace nk {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class T> using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace lanes {
typedef float F32 __attribute__((vector_size(LANES * 4)));
typedef double F64 __attribute__((vector_size(LANES * 8)));
typedef int32_t I32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t U32 __attribute__((vector_size(LANES * 4)));
typedef int64_t I64 __attribute__((vector_size(LANES * 8)));
typedef uint16_t U16 __attribute__((vector_size(LANES * 2)));
}  // namespace lanes
// For explicit instantiations.
#define NK_EACH_TYPE(MAKE) MAKE(float) MAKE(double) MAKE(bfloat16) MAKE(float16)

template <class A> using Vec = std::conditional_t<std::is_same_v<A, double>, lanes::F64, lanes::F32>;
template <class A> using Mask = std::conditional_t<std::is_same_v<A, double>, lanes::I64, lanes::I32>;

template <class A> inline Vec<A> splat(A value) { return value - Vec<A>{}; }
template <class A> inline Vec<A> select(Mask<A> where, Vec<A> yes, Vec<A> no) { return where ? yes : no; }

// Scalars.
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline float widen(float16 v) {
#if defined(__F16C__)
    return _cvtsh_ss(v.bits);
#elif defined(__aarch64__)
    __fp16 half;
    std::memcpy(&half, &v.bits, 2);
    return half;
#else
    uint32_t sign = uint32_t(v.bits & 0x8000) << 16, size = v.bits & 0x7fff;
    float out = float(size) * 0x1p-24f;  // below 2^-14, where the steps are equal
    uint32_t bits = (size << 13) + (112u << 23);
    if (size >= 0x7c00) bits += 112u << 23;  // infinity and NaN
    if (size >= 0x0400) std::memcpy(&out, &bits, 4);
    std::memcpy(&bits, &out, 4);
    bits |= sign;
    std::memcpy(&out, &bits, 4);
    return out;
#endif
}
template <class T> inline T narrow(accumulator<T> v);
template <> inline float narrow<float>(float v) { return v; }
template <> inline double narrow<double>(double v) { return v; }
template <> inline bfloat16 narrow<bfloat16>(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (v != v) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <> inline float16 narrow<float16>(float v) {
#if defined(__F16C__)
    return {uint16_t(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
    __fp16 half = v;
    float16 out;
    std::memcpy(&out.bits, &half, 2);
    return out;
#else
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff, half;
    if (size > 0x7f800000) {
        half = 0x7e00 | (size >> 13 & 0x3ff);
    } else if (size >= 0x477ff000) {
        half = 0x7c00;  // halfway from the largest number to the next one and beyond
    } else if (size >= 0x38800000) {
        half = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112u << 10);
    } else {
        float shifted = (v < 0 ? -v : v) + 0.5f;  // whose last place is half's smallest step
        std::memcpy(&half, &shifted, 4);
        half -= 126u << 23;
    }
    return {uint16_t(sign | half)};
#endif
}

// LANES elements from memory, of any alignment.
inline lanes::F32 load(const float *p) {
    lanes::F32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline lanes::F64 load(const double *p) {
    lanes::F64 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline lanes::F32 load(const bfloat16 *p) {
    // What GCC makes of the general form takes twice the time.
#if defined(__AVX512F__)
    return reinterpret_cast<lanes::F32>(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
#elif defined(__AVX2__)
    return reinterpret_cast<lanes::F32>(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16));
#else
    lanes::U16 half;
    std::memcpy(&half, p, sizeof half);
    lanes::U32 bits = __builtin_convertvector(half, lanes::U32) << 16;
    return reinterpret_cast<lanes::F32>(bits);
#endif
}
inline lanes::F32 load(const float16 *p) {
#if defined(__AVX512F__)
    return reinterpret_cast<lanes::F32>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))));
#elif defined(__F16C__) && defined(__AVX2__)
    return reinterpret_cast<lanes::F32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#else
    lanes::F32 v;
    for (int i = 0; i < LANES; ++i) v[i] = widen(p[i]);
    return v;
#endif
}

inline void store(float *p, lanes::F32 v) { std::memcpy(p, &v, sizeof v); }
inline void store(double *p, lanes::F64 v) { std::memcpy(p, &v, sizeof v); }
inline void store(bfloat16 *p, lanes::F32 v) {
    lanes::U32 bits = reinterpret_cast<lanes::U32>(v);
    lanes::U32 nan = reinterpret_cast<lanes::U32>(v != v);
    lanes::U32 rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) | nan) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded)));
#elif defined(__AVX2__)
    __m256i wide = reinterpret_cast<__m256i>(rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    lanes::U16 half = __builtin_convertvector(rounded, lanes::U16);
    std::memcpy(p, &half, sizeof half);
#endif
}
inline void store(float16 *p, lanes::F32 v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < LANES; ++i) p[i] = narrow<float16>(v[i]);
#endif
}

// The first n < LANES elements; the other lanes read as zero.
template <class T> inline Vec<accumulator<T>> load_some(const T *p, int64_t n) {
    T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}
template <class T> inline void store_some(T *p, Vec<accumulator<T>> v, int64_t n) {
    T padded[LANES];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}

// All ones in the first n lanes.
template <class A> inline Mask<A> first(int64_t n) {
    Mask<A> index;
    for (int i = 0; i < LANES; ++i) index[i] = i;
    return index < static_cast<decltype(index[0] + 0)>(n);
}

// By halves: in vectors down to four lanes, as a scalar loop over an array would go through memory.
template <class A> inline A sum_lanes(Vec<A> v) {
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    Four parts[LANES / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int width = LANES / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// The sums over the lanes of LANES vectors, one in each lane; the vectors are used up.
template <class A> inline Vec<A> sum_each(Vec<A> (&v)[LANES]) {
#if defined(__clang__)
    for (int i = 0; i < LANES; ++i) v[0][i] = sum_lanes<A>(v[i]);
#else
    for (int bit = 1; bit < LANES; bit *= 2) {
        Mask<A> even, odd;
        for (int i = 0; i < LANES; ++i) even[i] = (i & bit ? LANES : 0) + (i & ~bit), odd[i] = even[i] + bit;
        for (int i = 0; i < LANES / 2 / bit; ++i)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    }
#endif
    return v[0];
}

}  // namespace nk
