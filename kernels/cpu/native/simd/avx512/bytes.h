// A k-group in one AVX-512 register, with or without VNNI.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Bytes = __m512i;

DOT Bytes load_bytes(const uint8_t* p) { return _mm512_load_si512(p); }
DOT void store_bytes(uint8_t* p, Bytes b) { _mm512_store_si512(p, b); }
template <int shift, int mask>
DOT Bytes field(Bytes b) {
  const __m512i shifted = shift >= 0 ? _mm512_srli_epi16(b, shift & 7) : _mm512_slli_epi16(b, -shift & 7);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>(mask)));
}
DOT Bytes merge(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
DOT Bytes lookup(const uint8_t (&table)[16], Bytes b) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), b);
}
template <int n>
DOT I32x16 column(Bytes b) {
  return _mm512_and_si512(_mm512_srli_epi32(b, 8 * n), _mm512_set1_epi32(255));
}
template <int n>
DOT I32x16 signed_column(Bytes b) {
  return _mm512_srai_epi32(_mm512_slli_epi32(b, 24 - 8 * n), 24);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
