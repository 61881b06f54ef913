// A k-group in two AVX2 registers of eight rows each, and integer dot products: with 256-bit vpdpbusd, or without it as
// sums of column pairs in 16 bits.
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

#define LLAMACLUST_ROW_LOOKUPS

template <class At>
INLINE __m128i two_rows(At at, int row) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at(row)));
  const auto second = reinterpret_cast<const __m64*>(at(row + 1));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), second));
}
// Gather k-groups from at(row) of each row. four_of_eight takes bytes 4 * part to 4 * part + 3 of eight; four_of_four
// takes four bytes.
template <class At>
INLINE Bytes four_of_eight(At at, int part) {
  const auto four_rows = [&](int row) __attribute__((always_inline)) {
    return _mm256_castsi256_ps(_mm256_set_m128i(two_rows(at, row + 4), two_rows(at, row)));
  };
  const auto eight_rows = [&](int row) __attribute__((always_inline)) {
    const __m256 a = four_rows(row), b = four_rows(row + 2);
    return _mm256_castps_si256(part == 0 ? _mm256_shuffle_ps(a, b, 0x88) : _mm256_shuffle_ps(a, b, 0xdd));
  };
  return {{eight_rows(0), eight_rows(8)}};
}
template <class At>
INLINE Bytes four_of_four(At at) {
  const auto row = [&](int i) __attribute__((always_inline)) {
    int32_t four;
    memcpy(&four, at(i), 4);
    return four;
  };
  const auto rows = [&](int i) __attribute__((always_inline)) {
    return _mm_setr_epi32(row(i), row(i + 1), row(i + 2), row(i + 3));
  };
  EACH_HALF(Bytes, _mm256_set_m128i(rows(8 * i + 4), rows(8 * i)));
}

// Writes 16-bit numbers: the bytes of one line, with bit i of each byte of another line as ninth bit.
INLINE void nine_bits(const uint8_t* low, const uint8_t* ninths, int i, uint16_t* out) {
  const __m128i place = _mm_cvtsi32_si128(8 - i);
  const auto words = [](const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); };
  for (int at = 0; at < 64; at += 16) {
    const __m256i ninth = _mm256_and_si256(_mm256_sll_epi16(words(ninths + at), place), _mm256_set1_epi16(256));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + at), _mm256_or_si256(words(low + at), ninth));
  }
}

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
using Scale = I32x16;  // [row][the same number twice], 16 bits

INLINE Sums no_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
// Prevents the compiler from adding in a tree, for which it would keep all products in registers.
INLINE __m256i in_order(__m256i sums) {
  asm("" : "+x"(sums));
  return sums;
}
INLINE __m256i add_pairs(__m256i sums, __m256i products) { return in_order(_mm256_add_epi16(sums, products)); }
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
  EACH_HALF(I32x16, in_order(_mm256_add_epi32(total.v[i], _mm256_madd_epi16(sums.v[i], scale.v[i]))));
}
INLINE I32x16 add_sums(I32x16 total, Sums sums) {
  return add_scaled(total, sums, {{_mm256_set1_epi16(1), _mm256_set1_epi16(1)}});
}
INLINE Scale make_scale(I32x16 scale) {
  EACH_HALF(Scale, _mm256_blend_epi16(scale.v[i], _mm256_slli_epi32(scale.v[i], 16), 0xAA));
}
INLINE I32x16 scale_lanes(Scale scale) { EACH_HALF(I32x16, _mm256_srai_epi32(scale.v[i], 16)); }
// Returns total + scale * (sums - offset). `offset` is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  const __m256i halves = _mm256_set1_epi16(static_cast<int16_t>(-offset / 2));
  return add_scaled(add_scaled(total, sums, scale), {{halves, halves}}, scale);
}

#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
