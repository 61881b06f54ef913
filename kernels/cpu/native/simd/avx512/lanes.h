// Sixteen lanes in one AVX-512 register. The subsets F, BW, DQ and VL are required.
#pragma once

#include <immintrin.h>

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using F32x16 = __m512;
using I32x16 = __m512i;

INLINE F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x); }
INLINE F32x16 broadcast(float x) { return _mm512_set1_ps(x); }
INLINE F32x16 zero() { return _mm512_setzero_ps(); }
INLINE F32x16 add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
INLINE F32x16 sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
INLINE F32x16 mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
INLINE F32x16 div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
INLINE F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }                   // a > b ? a : b
INLINE F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }                   // a < b ? a : b
// Returns lanes [0, n) of a and the other lanes of b.
INLINE F32x16 first(int n, F32x16 a, F32x16 b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), b, a);
}
// a < b ? x : y
INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
INLINE F32x16 from_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
INLINE void to_f16(uint16_t* p, F32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE F32x16 from_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
// Returns 2^(e - 128) for exponent bytes e. It is exact; the results for e = 0 and e = 1 are subnormal.
INLINE F32x16 from_halved_e8m0(const uint8_t* p) {
  const __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
  const __mmask16 subnormal = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
  return _mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, subnormal, _mm512_set1_epi32(0x200000), e));
}
INLINE I32x16 broadcast(int32_t x) { return _mm512_set1_epi32(x); }
INLINE void store(int32_t* p, I32x16 x) { _mm512_storeu_si512(p, x); }
INLINE I32x16 add(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
INLINE I32x16 sub(I32x16 a, I32x16 b) { return _mm512_sub_epi32(a, b); }
INLINE I32x16 mul(I32x16 a, I32x16 b) { return _mm512_mullo_epi32(a, b); }
INLINE I32x16 max(I32x16 a, I32x16 b) { return _mm512_max_epi32(a, b); }
template <int n>
INLINE I32x16 shift_left(I32x16 a) { return _mm512_slli_epi32(a, n); }
INLINE I32x16 shift_right(I32x16 a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
// Divides by 2^n and rounds down.
template <int n>
INLINE I32x16 divide_by_power(I32x16 a) { return _mm512_srai_epi32(a, n); }
INLINE I32x16 keep(I32x16 a, int32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
INLINE I32x16 either(I32x16 a, I32x16 b) { return _mm512_or_si512(a, b); }
INLINE F32x16 to_float(I32x16 a) { return _mm512_cvtepi32_ps(a); }
// Rounds to nearest, ties to even. The caller ensures |x| < 2^31, because results outside that range differ between
// machines.
INLINE I32x16 to_int(F32x16 a) { return _mm512_cvtps_epi32(a); }
INLINE F32x16 bits_to_float(I32x16 a) { return _mm512_castsi512_ps(a); }
INLINE I32x16 float_to_bits(F32x16 a) { return _mm512_castps_si512(a); }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
