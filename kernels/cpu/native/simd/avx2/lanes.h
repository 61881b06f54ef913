// Sixteen lanes in two AVX2 registers. FMA and F16C are required.
#pragma once

#include <immintrin.h>

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct F32x16 {
  __m256 v[2];
};
struct I32x16 {
  __m256i v[2];
};

// Returns a vector whose half i is the expression.
#define EACH_HALF(T, expression)                                                        \
  const auto half_of = [&](int i) __attribute__((always_inline)) { return expression; }; \
  return T{{half_of(0), half_of(1)}}

INLINE F32x16 load(const float* p) { EACH_HALF(F32x16, _mm256_loadu_ps(p + 8 * i)); }
INLINE void store(float* p, F32x16 x) {
  _mm256_storeu_ps(p, x.v[0]);
  _mm256_storeu_ps(p + 8, x.v[1]);
}
INLINE F32x16 broadcast(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
INLINE F32x16 zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
INLINE F32x16 add(F32x16 a, F32x16 b) { EACH_HALF(F32x16, _mm256_add_ps(a.v[i], b.v[i])); }
INLINE F32x16 sub(F32x16 a, F32x16 b) { EACH_HALF(F32x16, _mm256_sub_ps(a.v[i], b.v[i])); }
INLINE F32x16 mul(F32x16 a, F32x16 b) { EACH_HALF(F32x16, _mm256_mul_ps(a.v[i], b.v[i])); }
INLINE F32x16 div(F32x16 a, F32x16 b) { EACH_HALF(F32x16, _mm256_div_ps(a.v[i], b.v[i])); }
// a * b + c
INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { EACH_HALF(F32x16, _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i])); }
// c - a * b
INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) { EACH_HALF(F32x16, _mm256_fnmadd_ps(a.v[i], b.v[i], c.v[i])); }
INLINE F32x16 max(F32x16 a, F32x16 b) { EACH_HALF(F32x16, _mm256_max_ps(a.v[i], b.v[i])); }  // a > b ? a : b
INLINE F32x16 min(F32x16 a, F32x16 b) { EACH_HALF(F32x16, _mm256_min_ps(a.v[i], b.v[i])); }  // a < b ? a : b
// Returns lanes [0, n) of a and the other lanes of b.
INLINE F32x16 first(int n, F32x16 a, F32x16 b) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const auto mask = [&](int i) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8 * i), lanes)); };
  EACH_HALF(F32x16, _mm256_blendv_ps(b.v[i], a.v[i], mask(i)));
}
// a < b ? x : y
INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  EACH_HALF(F32x16, _mm256_blendv_ps(y.v[i], x.v[i], _mm256_cmp_ps(a.v[i], b.v[i], _CMP_LT_OQ)));
}
INLINE F32x16 from_f16(const uint16_t* p) {
  EACH_HALF(F32x16, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i))));
}
INLINE void to_f16(uint16_t* p, F32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.v[1], _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256 widen_bf16(const uint16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
INLINE F32x16 from_bf16(const uint16_t* p) { EACH_HALF(F32x16, widen_bf16(p + 8 * i)); }
// Returns 2^(e - 128) for exponent bytes e. It is exact; the results for e = 0 and e = 1 are subnormal.
INLINE __m256 widen_halved_e8m0(const uint8_t* p) {
  const __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
  const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
  return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
INLINE F32x16 from_halved_e8m0(const uint8_t* p) { EACH_HALF(F32x16, widen_halved_e8m0(p + 8 * i)); }
INLINE I32x16 broadcast(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
INLINE void store(int32_t* p, I32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.v[1]);
}
INLINE I32x16 add(I32x16 a, I32x16 b) { EACH_HALF(I32x16, _mm256_add_epi32(a.v[i], b.v[i])); }
INLINE I32x16 sub(I32x16 a, I32x16 b) { EACH_HALF(I32x16, _mm256_sub_epi32(a.v[i], b.v[i])); }
INLINE I32x16 mul(I32x16 a, I32x16 b) { EACH_HALF(I32x16, _mm256_mullo_epi32(a.v[i], b.v[i])); }
INLINE I32x16 max(I32x16 a, I32x16 b) { EACH_HALF(I32x16, _mm256_max_epi32(a.v[i], b.v[i])); }
template <int n>
INLINE I32x16 shift_left(I32x16 a) { EACH_HALF(I32x16, _mm256_slli_epi32(a.v[i], n)); }
INLINE I32x16 shift_right(I32x16 a, int n) { EACH_HALF(I32x16, _mm256_srli_epi32(a.v[i], n)); }
// Divides by 2^n and rounds down.
template <int n>
INLINE I32x16 divide_by_power(I32x16 a) { EACH_HALF(I32x16, _mm256_srai_epi32(a.v[i], n)); }
INLINE I32x16 keep(I32x16 a, int32_t mask) { EACH_HALF(I32x16, _mm256_and_si256(a.v[i], _mm256_set1_epi32(mask))); }
INLINE I32x16 either(I32x16 a, I32x16 b) { EACH_HALF(I32x16, _mm256_or_si256(a.v[i], b.v[i])); }
INLINE F32x16 to_float(I32x16 a) { EACH_HALF(F32x16, _mm256_cvtepi32_ps(a.v[i])); }
// Rounds to nearest, ties to even. The caller ensures |x| < 2^31, because results outside that range differ between
// machines.
INLINE I32x16 to_int(F32x16 a) { EACH_HALF(I32x16, _mm256_cvtps_epi32(a.v[i])); }
INLINE F32x16 bits_to_float(I32x16 a) { EACH_HALF(F32x16, _mm256_castsi256_ps(a.v[i])); }
INLINE I32x16 float_to_bits(F32x16 a) { EACH_HALF(I32x16, _mm256_castps_si256(a.v[i])); }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
