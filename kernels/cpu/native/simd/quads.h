// Four int8 keys or values per lane, in dot products with four bytes that all lanes share. All results are exact.
#pragma once

#include "simd/int8.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// `load_quads` reads 64 bytes at any address. `add_products` adds to each lane its four products with the signed bytes
// in `four`. The lane's bytes are signed with an offset of 128; the caller subtracts kQuadOffset * the sum of `four`.
// `add_weighted` takes signed bytes without an offset, and unsigned bytes up to 254 in `four`.
using Quads = Bytes;

INLINE I32x16 add_products(I32x16 sum, Quads a, int32_t four) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || (defined(LLAMACLUST_NEON) && defined(__ARM_FEATURE_DOTPROD))
  return step<8>(sum, a, four);
#else
  return add_sums(sum, step<8>(no_sums(), a, four));
#endif
}
constexpr int kQuadOffset = kCentred<8> ? 0 : 128;

// Returns the halves of four bytes, rounded down. They and the remainders have seven bits each.
INLINE int32_t lower_halves(int32_t four) { return four >> 1 & 0x7f7f7f7f; }

#if defined(__AVX512BW__)

INLINE Quads load_quads(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE I32x16 add_weighted(I32x16 sum, Quads a, int32_t four) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(four), a);
#else
  const int32_t half = lower_halves(four);
  const __m512i ones = _mm512_set1_epi16(1);
  const __m512i low = _mm512_maddubs_epi16(_mm512_set1_epi32(half), a);
  const __m512i high = _mm512_maddubs_epi16(_mm512_set1_epi32(four - half), a);
  return add(add(sum, _mm512_madd_epi16(low, ones)), _mm512_madd_epi16(high, ones));
#endif
}

#elif defined(__AVX2__)

INLINE Quads load_quads(const uint8_t* p) {
  EACH_HALF(Quads, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i)));
}
INLINE I32x16 add_weighted(I32x16 sum, Quads a, int32_t four) {
#if defined(__AVXVNNI__)
  const __m256i weights = _mm256_set1_epi32(four);
  EACH_HALF(I32x16, _mm256_dpbusd_avx_epi32(sum.v[i], weights, a.v[i]));
#else
  const int32_t half = lower_halves(four);
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi32(half), high = _mm256_set1_epi32(four - half);
  const auto products = [&](__m256i weights, int i) __attribute__((always_inline)) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, a.v[i]), ones);
  };
  EACH_HALF(I32x16, _mm256_add_epi32(_mm256_add_epi32(sum.v[i], products(low, i)), products(high, i)));
#endif
}

#elif defined(LLAMACLUST_NEON)

INLINE Quads load_quads(const uint8_t* p) { return load_bytes(p); }
INLINE I32x16 add_weighted(I32x16 sum, Quads a, int32_t four) {
  const int32_t half = lower_halves(four);
  const auto bytes = [](int32_t x) { return vreinterpretq_s8_s32(vdupq_n_s32(x)); };
  const int8x16_t low = bytes(half), high = bytes(four - half);
  const auto values = [&](int i) __attribute__((always_inline)) { return vreinterpretq_s8_u8(a.v[i]); };
#if defined(__ARM_FEATURE_DOTPROD)
  EACH_QUARTER(I32x16, vdotq_s32(vdotq_s32(sum.v[i], values(i), low), values(i), high));
#else
  // The sum of two products of a seven-bit and a signed byte fits into 16 bits.
  const auto pairs = [&](int i, bool upper) __attribute__((always_inline)) {
    const int8x16_t v = values(i);
    return upper ? vpaddlq_s16(vmlal_high_s8(vmull_high_s8(v, low), v, high))
                 : vpaddlq_s16(vmlal_s8(vmull_s8(vget_low_s8(v), vget_low_s8(low)), vget_low_s8(v), vget_low_s8(high)));
  };
  EACH_QUARTER(I32x16, vaddq_s32(sum.v[i], vpaddq_s32(pairs(i, false), pairs(i, true))));
#endif
}

#else

INLINE Quads load_quads(const uint8_t* p) { return load_bytes(p); }
INLINE I32x16 add_weighted(const I32x16& sum, const Quads& a, int32_t four) {
  I32x16 r = sum;
  for (int n = 0; n < 4; n++) {
    const int32_t weight = four >> 8 * n & 255;
    for (int i = 0; i < 16; i++) r.v[i] += static_cast<int8_t>(a.v[4 * i + n]) * weight;
  }
  return r;
}

#endif

// Stores the lowest bytes of 64 lanes.
INLINE void store_low_bytes(uint8_t* p, const I32x16 (&x)[4]) {
#if defined(__AVX512BW__)
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i words = _mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, words));
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < 4; i += 2) {
    const __m256i first = _mm256_packs_epi32(x[i].v[0], x[i].v[1]), second = _mm256_packs_epi32(x[i + 1].v[0], x[i + 1].v[1]);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), bytes);
  }
#elif defined(LLAMACLUST_NEON)
  for (int i = 0; i < 4; i++) {
    const auto narrow = [&](int n) { return vmovn_s32(x[i].v[n]); };
    const int8x8_t low = vmovn_s16(vcombine_s16(narrow(0), narrow(1)));
    const int8x8_t high = vmovn_s16(vcombine_s16(narrow(2), narrow(3)));
    vst1q_u8(p + 16 * i, vreinterpretq_u8_s8(vcombine_s8(low, high)));
  }
#else
  for (int i = 0; i < 4; i++) {
    alignas(64) int32_t lanes[16];
    store(lanes, x[i]);
    for (int n = 0; n < 16; n++) p[16 * i + n] = static_cast<uint8_t>(lanes[n]);
  }
#endif
}

// Returns the maximum of sixteen integers.
INLINE int32_t greatest_lane(const I32x16& x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(x);
#elif defined(__AVX2__)
  const __m256i halves = _mm256_max_epi32(x.v[0], x.v[1]);
  __m128i r = _mm_max_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1)));
#elif defined(LLAMACLUST_NEON)
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
#else
  int32_t r = x.v[0];
  for (int i = 1; i < 16; i++) r = x.v[i] > r ? x.v[i] : r;
  return r;
#endif
}

// out[i] = the maximum lane of x[i].
template <int R>
INLINE void greatest_lanes(const I32x16 (&x)[R], int32_t (&out)[16]) {
  for (int r = 0; r < R; r++) out[r] = greatest_lane(x[r]);
}

#if defined(__AVX512F__)
// Combines pairs of vectors into one register after each halving of their lanes.
template <>
INLINE void greatest_lanes<8>(const I32x16 (&x)[8], int32_t (&out)[16]) {
  __m512i a[4], b[2];
  UNROLL for (int i = 0; i < 4; i++)
    a[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(x[i], x[i + 4], 0x44), _mm512_shuffle_i32x4(x[i], x[i + 4], 0xee));
  UNROLL for (int i = 0; i < 2; i++)
    b[i] = _mm512_max_epi32(_mm512_shuffle_i32x4(a[i], a[i + 2], 0x88), _mm512_shuffle_i32x4(a[i], a[i + 2], 0xdd));
  __m512i c = _mm512_max_epi32(_mm512_unpacklo_epi64(b[0], b[1]), _mm512_unpackhi_epi64(b[0], b[1]));
  c = _mm512_max_epi32(c, _mm512_shuffle_epi32(c, _MM_PERM_CDAB));
  const __m512i order = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, c));
}
#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
