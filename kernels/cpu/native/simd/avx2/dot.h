// Integer dot products on AVX2: pairs of columns in 16 bits, eight rows a register.
#pragma once

#include "simd/avx2/bytes.h"
#include "simd/dot_int16.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Sums = I32x16;   // [row][2 pairs of columns], 16 bits
using Scale = I32x16;  // [row][2 times the same], 16 bits

constexpr int kPanelRows = 1, kPanelTokens = 4;
constexpr int kFloatRows = 1, kFloatTokens = 5;
template <int kBits>
constexpr int kDirectTokens = 16;

INLINE Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE __m256i add_pairs(__m256i sums, __m256i products) {
  __m256i r = _mm256_add_epi16(sums, products);
  asm("" : "+x"(r));  // else the compiler adds in a tree, for which it must keep every product
  return r;
}
template <int kBits>
INLINE __m256i step(__m256i sums, __m256i w, __m256i a) {
  if constexpr (kBits < 8) return add_pairs(sums, _mm256_maddubs_epi16(w, a));
  const __m256i centred = _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
  return add_pairs(sums, _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(a, centred)));
}
template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const __m256i a = _mm256_set1_epi32(activations);
  return {step<kBits>(sums.lo, w.lo, a), step<kBits>(sums.hi, w.hi, a)};
}
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) {
  return {_mm256_add_epi32(total.lo, _mm256_madd_epi16(sums.lo, scale.lo)),
          _mm256_add_epi32(total.hi, _mm256_madd_epi16(sums.hi, scale.hi))};
}
INLINE I32x16 add_sums(I32x16 total, Sums sums) {
  return add_scaled(total, sums, {_mm256_set1_epi16(1), _mm256_set1_epi16(1)});
}
INLINE Scale make_scale(I32x16 scale) {
  return {_mm256_blend_epi16(scale.lo, _mm256_slli_epi32(scale.lo, 16), 0xAA),
          _mm256_blend_epi16(scale.hi, _mm256_slli_epi32(scale.hi, 16), 0xAA)};
}
INLINE I32x16 scale_lanes(Scale scale) { return {_mm256_srai_epi32(scale.lo, 16), _mm256_srai_epi32(scale.hi, 16)}; }
// total + scale * (sums - offset); offset is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  const __m256i halves = _mm256_set1_epi16(static_cast<int16_t>(-offset / 2));
  return add_scaled(add_scaled(total, sums, scale), {halves, halves}, scale);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
