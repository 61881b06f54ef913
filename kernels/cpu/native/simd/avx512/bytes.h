// A k-group in one AVX-512 register, with or without VNNI.
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

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
