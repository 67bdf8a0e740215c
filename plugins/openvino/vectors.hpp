// Registers of the instructions that this is compiled for, AVX-512 with VNNI or AVX2 (library.py), and what is done with them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define INLINE __attribute__((always_inline)) inline  // or sums leave their registers for a call
#define UNROLLED _Pragma("GCC unroll 8")              // or they leave them in every step

namespace d2sd {

constexpr size_t LINE = 64;  // bytes that are fetched at once

struct Half {  // a float of 16 bits
    uint16_t bits;
};

struct Brief {  // a float's upper 16 bits (bf16)
    uint16_t bits;
};
using Pair = uint32_t;  // of Brief, the first one below

INLINE Brief brief(float x) {  // to the nearest, or to the even one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// Rows first to count, at most Most at a time: of(the first of them, how many).
template <size_t Most, typename Of>
INLINE void some_at_a_time(size_t count, Of of, size_t first = 0) {
    for (; first + Most <= count; first += Most) of(first, std::integral_constant<size_t, Most>());
    if constexpr (Most > 1) some_at_a_time<Most == 8 ? 4 : Most - 1>(count, of, first);
}

constexpr size_t EIGHT = 8;  // floats, of which some functions make do
INLINE __m256 eight(const float* at) { return _mm256_loadu_ps(at); }
INLINE __m256 eight(const Half* at) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))); }
INLINE void store(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
INLINE void store(Half* to, __m256 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

INLINE float total(__m256 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Sums of eight registers, in one.
INLINE __m256 sums(const __m256 (&x)[4], const __m256 (&y)[4]) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(y[0], y[1]), _mm256_hadd_ps(y[2], y[3]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

INLINE float largest(__m256 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

INLINE int total(__m256i x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

#ifdef __AVX512VNNI__

constexpr size_t LANES = 16;  // floats in a register

using Reals = __m512;
using Integers = __m512i;

INLINE Reals zeros() { return _mm512_setzero_ps(); }
INLINE Reals all(float x) { return _mm512_set1_ps(x); }
INLINE Reals load(const float* at) { return _mm512_loadu_ps(at); }
INLINE void store(float* to, Reals x) { _mm512_storeu_ps(to, x); }
INLINE Reals load(const Half* at) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }
INLINE Reals multiply_add(Reals a, Reals b, Reals sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Reals larger(Reals a, Reals b) { return _mm512_max_ps(a, b); }
INLINE Reals smaller(Reals a, Reals b) { return _mm512_min_ps(a, b); }
INLINE Reals nearest(Reals x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Reals times_power_of_two(Reals x, Reals whole) { return _mm512_scalef_ps(x, whole); }
INLINE Reals where_not(Reals x, float is, Reals given) {  // else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(is), _CMP_NEQ_OQ), given);
}
INLINE float largest(Reals x) { return _mm512_reduce_max_ps(x); }
INLINE float total(Reals x) { return _mm512_reduce_add_ps(x); }
INLINE Reals real(Integers x) { return _mm512_cvtepi32_ps(x); }
INLINE Integers integers(Reals x) { return _mm512_cvtps_epi32(x); }
INLINE Integers sum(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
INLINE int total(Integers x) { return _mm512_reduce_add_epi32(x); }
INLINE Integers no_integers() { return _mm512_setzero_si512(); }
INLINE Integers bytes(const uint8_t* at) { return _mm512_loadu_si512(at); }
INLINE Integers all_integers(int x) { return _mm512_set1_epi32(x); }
INLINE Integers low_bits(Integers x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Integers high_bits(Integers x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// Products of bf16 numbers are added pair by pair, each pair's upper ones first, and rounded after each (Intel's manual, VDPBF16PS).
// By the assembler's names: not every CPU that this is compiled for has them, who calls them knows that this one does.
INLINE Reals add_products(Reals sum, Integers a, Integers b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
INLINE Integers brief(Reals first, Reals second) {
    Integers pairs;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs) : "v"(second), "v"(first));
    return pairs;
}
INLINE Reals lower(Integers pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE Reals upper(Integers pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(~0xFFFF))); }
INLINE Integers swapped(Integers pairs) { return _mm512_rol_epi32(pairs, 16); }
INLINE Integers load(const Pair* at) { return _mm512_loadu_si512(at); }
INLINE void store(Pair* to, Integers x) { _mm512_storeu_si512(to, x); }

// Sums of products of 4-bit codes with bytes: here in 32 bits; with AVX2 in 16, which hold those of a block (16·15·127).
INLINE Integers dot_bytes(Integers sum, Integers a, Integers b) { return _mm512_dpbusd_epi32(sum, a, b); }
INLINE Integers of_dots(Integers sum) { return sum; }

// Codes of 8 bits come without a sign here: OFFSET was added, and its products are taken off again.
using Factor = int8_t;  // that they are multiplied with
constexpr int32_t OFFSET = 128;
INLINE Integers eight_bits(const uint8_t* at) { return bytes(at); }
INLINE Integers dot_eight_bits(Integers sum, Integers a, Integers b) { return _mm512_dpbusd_epi32(sum, a, b); }

#else

constexpr size_t LANES = 8;

using Reals = __m256;
using Integers = __m256i;

INLINE Reals zeros() { return _mm256_setzero_ps(); }
INLINE Reals all(float x) { return _mm256_set1_ps(x); }
INLINE Reals load(const float* at) { return eight(at); }
INLINE Reals load(const Half* at) { return eight(at); }
INLINE Reals multiply_add(Reals a, Reals b, Reals sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Reals larger(Reals a, Reals b) { return _mm256_max_ps(a, b); }
INLINE Reals smaller(Reals a, Reals b) { return _mm256_min_ps(a, b); }
INLINE Reals nearest(Reals x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Reals times_power_of_two(Reals x, Reals whole) {
    const Integers power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return x * _mm256_castsi256_ps(power);
}
INLINE Reals where_not(Reals x, float is, Reals given) {
    return _mm256_and_ps(given, _mm256_cmp_ps(x, all(is), _CMP_NEQ_OQ));
}
INLINE Reals real(Integers x) { return _mm256_cvtepi32_ps(x); }
INLINE Integers integers(Reals x) { return _mm256_cvtps_epi32(x); }
INLINE Integers sum(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
INLINE Integers no_integers() { return _mm256_setzero_si256(); }
INLINE Integers bytes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
INLINE Integers all_integers(int x) { return _mm256_set1_epi32(x); }
INLINE Integers low_bits(Integers x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE Integers high_bits(Integers x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
INLINE Integers dot_bytes(Integers sum, Integers a, Integers b) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b)); }
INLINE Integers of_dots(Integers sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

using Factor = int16_t;
constexpr int32_t OFFSET = 0;
INLINE Integers eight_bits(const uint8_t* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))); }
INLINE Integers dot_eight_bits(Integers sum, Integers a, Integers b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

#endif

// exp to 2e-7, of what is between -87 and 87: 2^n times a polynomial on half an octave (coefficients: Cephes' expf).
INLINE Reals exponential(Reals x) {
    x = smaller(larger(x, all(-87.3f)), all(87.3f));
    const Reals n = nearest(x * all(1.44269504f));
    const Reals r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), x));
    Reals p = all(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = multiply_add(p, r, all(next));
    return times_power_of_two(multiply_add(p, r * r, r) + all(1.0f), n);
}

}  // namespace d2sd
