// Int8 values in memory: as float lanes, and in pairs for integer dot products with int16. All of it is exact.
#pragma once

#include "lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

#define NARROW [[maybe_unused]] inline __attribute__((always_inline))

// `Pairs` are two int16 a lane; `dot_pairs` adds to each lane's sum its two products with the int16s in `two`.
#if defined(__AVX512BW__)

NARROW F32x16 from_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
using Pairs = __m512i;
NARROW Pairs load_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
NARROW I32x16 dot_pairs(I32x16 sum, Pairs a, int32_t two) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, _mm512_set1_epi32(two));
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, _mm512_set1_epi32(two)));
#endif
}

#elif defined(__AVX2__)

NARROW __m256 half_from_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
NARROW F32x16 from_i8(const int8_t* p) { return {half_from_i8(p), half_from_i8(p + 8)}; }
struct Pairs {
  __m256i lo, hi;
};
NARROW __m256i half_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NARROW Pairs load_pairs(const int8_t* p) { return {half_pairs(p), half_pairs(p + 16)}; }
NARROW I32x16 dot_pairs(I32x16 sum, Pairs a, int32_t two) {
  const __m256i b = _mm256_set1_epi32(two);
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b)), _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b))};
}

#else

NARROW F32x16 from_i8(const int8_t* p) {
  alignas(64) float v[16];
  for (int i = 0; i < 16; i++) v[i] = p[i];
  return load(v);
}
struct Pairs {
  int16_t v[32];
};
NARROW Pairs load_pairs(const int8_t* p) {
  Pairs r;
  for (int i = 0; i < 32; i++) r.v[i] = p[i];
  return r;
}
NARROW I32x16 dot_pairs(I32x16 sum, const Pairs& a, int32_t two) {
  alignas(64) int32_t v[16];
  store(v, sum);
  const int32_t low = static_cast<int16_t>(two & 0xffff), high = two >> 16;
  for (int i = 0; i < 16; i++) v[i] += a.v[2 * i] * low + a.v[2 * i + 1] * high;
  return load(v);
}

#endif

#undef NARROW

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
