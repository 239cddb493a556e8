// Vectors of the width that the file is compiled for, and the three number formats. Everything is local to its variant:
// the linker would merge an inline function shared by two variants, and use one variant's instructions for both.
#pragma once

#include <cstdint>
#include <cstring>

#include "layer.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define LORAF_INLINE inline __attribute__((always_inline))

namespace {

using namespace loraf;

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
constexpr int kSums = 16;   // vectors of sums that fit the registers, next to their operands
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kSums = 8;
#else
constexpr int kWidth = 4;
constexpr int kSums = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class V>
LORAF_INLINE V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
LORAF_INLINE void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

LORAF_INLINE Floats all(float value) { return Floats{} + value; }

// --- bfloat16 ---------------------------------------------------------------------------------------------------

LORAF_INLINE float bf16_to_float(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

// Rounds to nearest, ties to even. A NaN stays a NaN.
LORAF_INLINE uint16_t float_to_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value) return uint16_t(word >> 16 | 0x40);
    return uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

LORAF_INLINE Floats load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)  // GCC compiles the plain form to four instructions
    return (Floats)((Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, load<__m256i>(from)) << 16);
#elif defined(__AVX2__)
    return (Floats)((Words)_mm256_cvtepu16_epi32(load<__m128i>(from)) << 16);
#else
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

LORAF_INLINE void store_bf16(uint16_t* to, Floats value) {
    Words word = (Words)value;
    Words rounded = (word + 0x7FFF + (word >> 16 & 1)) >> 16, quiet = word >> 16 | 0x40;
    Words nan = (Words)(value != value);
    store(to, __builtin_convertvector((nan & quiet) | (~nan & rounded), Halves));
}

// --- float16 ----------------------------------------------------------------------------------------------------

#if defined(__F16C__)
LORAF_INLINE float f16_to_float(uint16_t bits) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }
LORAF_INLINE uint16_t float_to_f16(float value) {
    return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
}
#else
// With integers: moves the significand into place and corrects the exponent, also of denormals, by a multiplication.
LORAF_INLINE float f16_to_float(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = uint32_t(bits & 0x7FFF) << 13;
    if (magnitude >= 0x7C00u << 13) magnitude += uint32_t(255 - 31 - 112) << 23;  // infinity or NaN
    float value, scale = 0x1p112f;
    if (magnitude >= 0x7F800000u) scale = 1;
    memcpy(&value, &magnitude, 4);
    value *= scale;
    uint32_t word;
    memcpy(&word, &value, 4);
    word |= sign;
    memcpy(&value, &word, 4);
    return value;
}
LORAF_INLINE uint16_t float_to_f16(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    uint16_t sign = uint16_t(word >> 16 & 0x8000);
    uint32_t magnitude = word & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00 | (magnitude >> 13 & 0x1FF));
    if (magnitude >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65,520 and more round to infinity
    if (magnitude < 0x38800000) {  // denormal: adding one half makes the processor round at 2^-24
        float absolute;
        memcpy(&absolute, &magnitude, 4);
        absolute += 0.5f;
        memcpy(&word, &absolute, 4);
        return uint16_t(sign | (word - 0x3F000000));
    }
    return uint16_t(sign | ((magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}
#endif

LORAF_INLINE Floats load_f16(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xFFFF, load<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    Floats value{};
    for (int i = 0; i < kWidth; i++) value[i] = f16_to_float(from[i]);
    return value;
#endif
}

LORAF_INLINE void store_f16(uint16_t* to, Floats value) {
#if defined(__AVX512F__)
    store(to, _mm512_maskz_cvtps_ph(0xFFFF, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    store(to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; i++) to[i] = float_to_f16(value[i]);
#endif
}

// --- one format, chosen at compile time -------------------------------------------------------------------------

template <int32_t kind>
struct Format;

template <>
struct Format<kBfloat16> {
    typedef uint16_t Stored;
    static LORAF_INLINE float get(Stored s) { return bf16_to_float(s); }
    static LORAF_INLINE Stored put(float f) { return float_to_bf16(f); }
    static LORAF_INLINE Floats get(const Stored* s) { return load_bf16(s); }
    static LORAF_INLINE void put(Stored* s, Floats f) { store_bf16(s, f); }
};

template <>
struct Format<kFloat16> {
    typedef uint16_t Stored;
    static LORAF_INLINE float get(Stored s) { return f16_to_float(s); }
    static LORAF_INLINE Stored put(float f) { return float_to_f16(f); }
    static LORAF_INLINE Floats get(const Stored* s) { return load_f16(s); }
    static LORAF_INLINE void put(Stored* s, Floats f) { store_f16(s, f); }
};

template <>
struct Format<kFloat32> {
    typedef float Stored;
    static LORAF_INLINE float get(Stored s) { return s; }
    static LORAF_INLINE Stored put(float f) { return f; }
    static LORAF_INLINE Floats get(const Stored* s) { return load<Floats>(s); }
    static LORAF_INLINE void put(Stored* s, Floats f) { store(s, f); }
};

// --- transposition ----------------------------------------------------------------------------------------------

// Swaps the lanes of b whose index lacks bit `step` with the lanes of a whose index has it.
template <int step>
LORAF_INLINE void exchange(Floats& a, Floats& b) {
#if defined(__clang__)
    Words upper{};
    for (int i = 0; i < kWidth; i++) upper[i] = i & step ? ~0u : 0u;
    Floats from_b{}, from_a{};
    for (int i = 0; i < kWidth; i++) {
        from_b[i] = b[i & ~step];
        from_a[i] = a[i | step];
    }
    Words low = (~upper & (Words)a) | (upper & (Words)from_b), high = (~upper & (Words)from_a) | (upper & (Words)b);
    a = (Floats)low;
    b = (Floats)high;
#else
    Words low, high;
    for (int i = 0; i < kWidth; i++) {
        low[i] = uint32_t(i & step ? kWidth + (i & ~step) : i);
        high[i] = uint32_t(i & step ? kWidth + i : i | step);
    }
    Floats first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
#endif
}

template <int step>
LORAF_INLINE void transpose_from(Floats (&square)[kWidth]) {
    if constexpr (step > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; i++)
            if (!(i & step)) exchange<step>(square[i], square[i | step]);
        transpose_from<step / 2>(square);
    }
}

LORAF_INLINE void transpose(Floats (&square)[kWidth]) { transpose_from<kWidth / 2>(square); }

}  // namespace
