// A k-group in one AVX-512 register, and integer dot products: with vpdpbusd, or without it as sums of column pairs in
// 16 bits.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Bytes = __m512i;

INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
INLINE void store_bytes(uint8_t* p, Bytes b) { _mm512_store_si512(p, b); }
template <int shift, int mask>
INLINE Bytes field(Bytes b) {
  const __m512i shifted = shift >= 0 ? _mm512_srli_epi16(b, shift & 7) : _mm512_slli_epi16(b, -shift & 7);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>(mask)));
}
INLINE Bytes merge(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
INLINE Bytes lookup(const uint8_t (&table)[16], Bytes b) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), b);
}
template <int n>
INLINE I32x16 column(Bytes b) {
  return _mm512_and_si512(_mm512_srli_epi32(b, 8 * n), _mm512_set1_epi32(255));
}
template <int n>
INLINE I32x16 signed_column(Bytes b) {
  return _mm512_srai_epi32(_mm512_slli_epi32(b, 24 - 8 * n), 24);
}

INLINE I32x16 as_lanes(Bytes b) { return b; }
INLINE Bytes as_bytes(I32x16 a) { return a; }
INLINE Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
INLINE Bytes add_bytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }

template <int n>
INLINE I32x16 lookup_points(const uint16_t* table, I32x16 index) {
  if constexpr (n == 64) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
  } else {
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(n / 2));
    return _mm512_mask_mov_epi16(lookup_points<n / 2>(table, index), upper, lookup_points<n / 2>(table + n / 2, index));
  }
}

template <int bits>
INLINE Bytes spread(I32x16 points, int half) {
  const __m128i lower = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
  const __m128i upper = _mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15);
  const __m512i twice = _mm512_shuffle_epi8(points, _mm512_broadcast_i32x4(half == 0 ? lower : upper));
  return _mm512_srlv_epi16(twice, _mm512_set1_epi32(bits << 16));
}

template <int offset>
INLINE Bytes with_signs(Bytes b, const uint8_t* bits) {
  uint64_t negative;
  memcpy(&negative, bits, 8);
  return _mm512_mask_sub_epi8(b, negative, _mm512_set1_epi8(static_cast<char>(2 * offset)), b);
}

constexpr int kPanelRows = 2, kPanelTokens = 6, kDirectWidth = 8;
constexpr int kFloatRows = 4, kFloatTokens = 6;

#if defined(__AVX512VNNI__)

template <int kBits>
constexpr bool kCentred = false;
constexpr bool kSumsFrom = true;

template <int kBits>
#if defined(LLAMACLUST_TILES)
constexpr int kDirectTokens = 16;
#else
constexpr int kDirectTokens = kBits == 2 || kBits == 4 ? 128 : 32;
#endif

template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  return _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(activations));
}

#else

using Sums = __m512i;   // [row][2 pairs of columns], 16 bits
using Scale = __m512i;  // [row][the same number twice], 16 bits

template <int kBits>
constexpr int kDirectTokens = 32;

INLINE Sums no_sums() { return _mm512_setzero_si512(); }
INLINE Sums add_pairs(Sums sums, __m512i products) {
  __m512i r = _mm512_add_epi16(sums, products);
  // Prevents the compiler from adding in a tree, for which it would keep all products in registers.
  asm("" : "+v"(r));
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
// Returns total + scale * (sums - offset). `offset` is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  const __m512i halves = _mm512_set1_epi16(static_cast<int16_t>(-offset / 2));
  return add_scaled(add_scaled(total, sums, scale), halves, scale);
}

#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
