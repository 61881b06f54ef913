// A k-group in two AVX2 registers, and integer dot products: with vpdpbusd in 256 bits, or without it pairs of columns in
// 16 bits, eight rows a register.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Bytes = I32x16;

INLINE Bytes load_bytes(const uint8_t* p) {
  EACH_HALF(Bytes, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
}
INLINE void store_bytes(uint8_t* p, Bytes b) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), b.v[0]);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 32), b.v[1]);
}
template <int shift, int mask>
INLINE __m256i field(__m256i b) {
  const __m256i shifted = shift >= 0 ? _mm256_srli_epi16(b, shift & 7) : _mm256_slli_epi16(b, -shift & 7);
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)));
}
template <int shift, int mask>
INLINE Bytes field(Bytes b) { EACH_HALF(Bytes, (field<shift, mask>(b.v[i]))); }
INLINE Bytes merge(Bytes a, Bytes b) { EACH_HALF(Bytes, _mm256_or_si256(a.v[i], b.v[i])); }
INLINE Bytes lookup(const uint8_t (&table)[16], Bytes b) {
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  EACH_HALF(Bytes, _mm256_shuffle_epi8(entries, b.v[i]));
}
template <int n>
INLINE I32x16 column(Bytes b) {
  EACH_HALF(I32x16, _mm256_and_si256(_mm256_srli_epi32(b.v[i], 8 * n), _mm256_set1_epi32(255)));
}
template <int n>
INLINE I32x16 signed_column(Bytes b) {
  EACH_HALF(I32x16, _mm256_srai_epi32(_mm256_slli_epi32(b.v[i], 24 - 8 * n), 24));
}

INLINE I32x16 as_lanes(Bytes b) { return b; }
INLINE Bytes as_bytes(I32x16 a) { return a; }
INLINE Bytes both(Bytes a, Bytes b) { EACH_HALF(Bytes, _mm256_and_si256(a.v[i], b.v[i])); }
INLINE Bytes add_bytes(Bytes a, Bytes b) { EACH_HALF(Bytes, _mm256_add_epi8(a.v[i], b.v[i])); }

INLINE __m256i sixteen_points(const uint16_t* table, const uint16_t* i) {
  const auto at = [&](int n) { return static_cast<int16_t>(table[i[n]]); };
  return _mm256_setr_epi16(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11), at(12),
                           at(13), at(14), at(15));
}
template <int n>
INLINE I32x16 lookup_points(const uint16_t* table, I32x16 index) {
  alignas(64) uint16_t indices[32];
  store_bytes(reinterpret_cast<uint8_t*>(indices), index);
  EACH_HALF(I32x16, sixteen_points(table, indices + 16 * i));
}

template <int bits>
INLINE __m256i spread(__m256i points, int half) {
  const __m128i lower = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
  const __m128i upper = _mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15);
  const __m256i twice = _mm256_shuffle_epi8(points, _mm256_broadcastsi128_si256(half == 0 ? lower : upper));
  return _mm256_blend_epi16(twice, _mm256_srli_epi16(twice, bits), 0xAA);
}
template <int bits>
INLINE Bytes spread(I32x16 points, int half) { EACH_HALF(Bytes, (spread<bits>(points.v[i], half))); }

template <int offset>
INLINE __m256i with_signs(__m256i b, const uint8_t* bits) {
  int32_t word;
  memcpy(&word, bits, 4);
  const __m256i byte_of_bit = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i one_bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of_bit), one_bit);
  const __m256i negated = _mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(2 * offset)), b);
  return _mm256_blendv_epi8(b, negated, _mm256_cmpeq_epi8(spread, one_bit));
}
template <int offset>
INLINE Bytes with_signs(Bytes b, const uint8_t* bits) {
  EACH_HALF(Bytes, with_signs<offset>(b.v[i], bits + 4 * i));
}

constexpr int kPanelRows = 1, kPanelTokens = 4, kDirectWidth = 4;
constexpr int kFloatRows = 1, kFloatTokens = 5;
template <int kBits>
constexpr int kDirectTokens = 16;

#if defined(__AVXVNNI__)

template <int kBits>
constexpr bool kCentred = false;
constexpr bool kSumsFrom = true;

template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const __m256i a = _mm256_set1_epi32(activations);
  EACH_HALF(Sums, _mm256_dpbusd_avx_epi32(sums.v[i], w.v[i], a));
}

#else

using Sums = I32x16;   // [row][2 pairs of columns], 16 bits
using Scale = I32x16;  // [row][2 times the same], 16 bits

INLINE Sums no_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
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
  EACH_HALF(Sums, step<kBits>(sums.v[i], w.v[i], a));
}
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) {
  EACH_HALF(I32x16, _mm256_add_epi32(total.v[i], _mm256_madd_epi16(sums.v[i], scale.v[i])));
}
INLINE I32x16 add_sums(I32x16 total, Sums sums) {
  return add_scaled(total, sums, {{_mm256_set1_epi16(1), _mm256_set1_epi16(1)}});
}
INLINE Scale make_scale(I32x16 scale) {
  EACH_HALF(Scale, _mm256_blend_epi16(scale.v[i], _mm256_slli_epi32(scale.v[i], 16), 0xAA));
}
INLINE I32x16 scale_lanes(Scale scale) { EACH_HALF(I32x16, _mm256_srai_epi32(scale.v[i], 16)); }
// total + scale * (sums - offset); offset is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  const __m256i halves = _mm256_set1_epi16(static_cast<int16_t>(-offset / 2));
  return add_scaled(add_scaled(total, sums, scale), {{halves, halves}}, scale);
}

#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
