// Int8 values in memory as float lanes, and as pairs for integer dot products with int16; all of it is exact. The file
// also rounds floats to integers, in plain loops that compilers vectorize.
#pragma once

#include "simd/dot.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// `Pairs` has two int16 per lane. `dot_pairs` adds to each lane of `sum` its two products with the int16s in `two`.
#if defined(__AVX512BW__)

INLINE F32x16 from_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
using Pairs = __m512i;
INLINE Pairs load_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE I32x16 dot_pairs(I32x16 sum, Pairs a, int32_t two) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, _mm512_set1_epi32(two));
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, _mm512_set1_epi32(two)));
#endif
}

#elif defined(__AVX2__)

INLINE __m256 half_from_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE F32x16 from_i8(const int8_t* p) { EACH_HALF(F32x16, half_from_i8(p + 8 * i)); }
using Pairs = I32x16;
INLINE Pairs load_pairs(const int8_t* p) {
  EACH_HALF(Pairs, _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i))));
}
INLINE I32x16 dot_pairs(I32x16 sum, Pairs a, int32_t two) {
  const __m256i b = _mm256_set1_epi32(two);
#if defined(__AVXVNNI__)
  EACH_HALF(I32x16, _mm256_dpwssd_avx_epi32(sum.v[i], a.v[i], b));
#else
  EACH_HALF(I32x16, _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(a.v[i], b)));
#endif
}

#elif defined(LLAMACLUST_NEON)

INLINE F32x16 from_i8(const int8_t* p) {
  const int8x16_t q = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_s8(vget_high_s8(q));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
struct Pairs {
  int16x8_t v[4];
};
INLINE Pairs load_pairs(const int8_t* p) {
  const int8x16_t a = vld1q_s8(p), b = vld1q_s8(p + 16);
  return {{vmovl_s8(vget_low_s8(a)), vmovl_s8(vget_high_s8(a)), vmovl_s8(vget_low_s8(b)), vmovl_s8(vget_high_s8(b))}};
}
INLINE I32x16 dot_pairs(I32x16 sum, Pairs a, int32_t two) {
  const int16x8_t b = vreinterpretq_s16_s32(vdupq_n_s32(two));
  UNROLL for (int i = 0; i < 4; i++) {
    const int32x4_t low = vmull_s16(vget_low_s16(a.v[i]), vget_low_s16(b)), high = vmull_high_s16(a.v[i], b);
    sum.v[i] = vaddq_s32(sum.v[i], vpaddq_s32(low, high));
  }
  return sum;
}

#else

INLINE F32x16 from_i8(const int8_t* p) {
  alignas(64) float v[16];
  for (int i = 0; i < 16; i++) v[i] = p[i];
  return load(v);
}
struct Pairs {
  int16_t v[32];
};
INLINE Pairs load_pairs(const int8_t* p) { EACH(Pairs, p[i]); }
INLINE I32x16 dot_pairs(I32x16 sum, const Pairs& a, int32_t two) {
  const int32_t low = static_cast<int16_t>(two & 0xffff), high = two >> 16;
  alignas(64) int32_t v[16];
  store(v, sum);
  for (int i = 0; i < 16; i++) v[i] += a.v[2 * i] * low + a.v[2 * i + 1] * high;
  EACH(I32x16, v[i]);
}

#endif

// Prevents loops over values from being unrolled before they are vectorized.
#define AS_VECTORS _Pragma("GCC unroll 1")

// Returns the bits of the greatest magnitude of n values. Bits of magnitudes have the order of the numbers, with
// infinity and NaN last.
INLINE int32_t greatest_magnitude(const float* x, int n) {
  int32_t greatest = 0;
  AS_VECTORS for (int i = 0; i < n; i++) {
    const int32_t magnitude = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
    greatest = magnitude > greatest ? magnitude : greatest;
  }
  return greatest;
}
constexpr int32_t kNotFinite = 0x7f800000;

// Rounds to nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
INLINE int32_t nearest_int(float x) { return __builtin_bit_cast(int32_t, x + 0x1.8p23f) - 0x4b400000; }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
