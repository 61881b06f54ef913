// Integer dot products on AVX-512BW without VNNI: pairs of columns in 16 bits.
#pragma once

#include "simd/avx512/bytes.h"
#include "simd/dot_int16.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Sums = __m512i;   // [row][2 pairs of columns], 16 bits
using Scale = __m512i;  // [row][2 times the same], 16 bits

constexpr int kPanelRows = 2, kPanelTokens = 6;
constexpr int kFloatRows = 4, kFloatTokens = 4;
template <int kBits>
constexpr int kDirectTokens = 32;

INLINE Sums no_sums() { return _mm512_setzero_si512(); }
INLINE Sums add_pairs(Sums sums, __m512i products) {
  __m512i r = _mm512_add_epi16(sums, products);
  asm("" : "+v"(r));  // else the compiler adds in a tree, for which it must keep every product
  return r;
}
template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const __m512i a = _mm512_set1_epi32(activations);
  if constexpr (kBits < 8) return add_pairs(sums, _mm512_maddubs_epi16(w, a));
  const __m512i centred = _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(0x80)));
  const __m512i moved_sign = _mm512_mask_sub_epi8(a, _mm512_movepi8_mask(centred), _mm512_setzero_si512(), a);
  return add_pairs(sums, _mm512_maddubs_epi16(_mm512_abs_epi8(centred), moved_sign));
}
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) { return add(total, _mm512_madd_epi16(sums, scale)); }
INLINE I32x16 add_sums(I32x16 total, Sums sums) { return add_scaled(total, sums, _mm512_set1_epi16(1)); }
INLINE Scale make_scale(I32x16 scale) {
  return _mm512_mask_blend_epi16(0xAAAAAAAA, scale, _mm512_slli_epi32(scale, 16));
}
INLINE I32x16 scale_lanes(Scale scale) { return _mm512_srai_epi32(scale, 16); }
// total + scale * (sums - offset); offset is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  const __m512i halves = _mm512_set1_epi16(static_cast<int16_t>(-offset / 2));
  return add_scaled(add_scaled(total, sums, scale), halves, scale);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
