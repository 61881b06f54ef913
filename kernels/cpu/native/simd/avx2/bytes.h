// A k-group in two AVX2 registers, with or without VNNI.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Bytes = I32x16;

DOT Bytes load_bytes(const uint8_t* p) {
  return {_mm256_load_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
DOT void store_bytes(uint8_t* p, Bytes b) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), b.lo);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), b.hi);
}
template <int shift, int mask>
DOT __m256i field(__m256i b) {
  const __m256i shifted = shift >= 0 ? _mm256_srli_epi16(b, shift & 7) : _mm256_slli_epi16(b, -shift & 7);
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)));
}
template <int shift, int mask>
DOT Bytes field(Bytes b) { return {field<shift, mask>(b.lo), field<shift, mask>(b.hi)}; }
DOT Bytes merge(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
DOT Bytes lookup(const uint8_t (&table)[16], Bytes b) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(entries, b.lo), _mm256_shuffle_epi8(entries, b.hi)};
}
template <int n>
DOT I32x16 column(Bytes b) {
  const __m256i mask = _mm256_set1_epi32(255);
  return {_mm256_and_si256(_mm256_srli_epi32(b.lo, 8 * n), mask),
          _mm256_and_si256(_mm256_srli_epi32(b.hi, 8 * n), mask)};
}
template <int n>
DOT I32x16 signed_column(Bytes b) {
  return {_mm256_srai_epi32(_mm256_slli_epi32(b.lo, 24 - 8 * n), 24),
          _mm256_srai_epi32(_mm256_slli_epi32(b.hi, 24 - 8 * n), 24)};
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
