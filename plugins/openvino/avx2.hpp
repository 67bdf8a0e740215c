// What the kernels share.
#pragma once

#include <immintrin.h>

// For these functions alone: what else is compiled must run anywhere.
#define AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
#define AVX2 AVX2_TARGET __attribute__((always_inline)) inline

namespace d2sd {

constexpr size_t LANES = 8;  // floats in a register

AVX2 float largest(__m256 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

AVX2 int total(__m256i x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

}  // namespace d2sd
