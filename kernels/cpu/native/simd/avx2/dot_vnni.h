// Integer dot products with vpdpbusd in 256 bits.
#pragma once

#include "simd/avx2/bytes.h"
#include "simd/dot_int32.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <int kBits>
constexpr bool kCentred = false;
constexpr bool kSumsFrom = true;

constexpr int kPanelRows = 1, kPanelTokens = 4;
constexpr int kFloatRows = 1, kFloatTokens = 5;
template <int kBits>
constexpr int kDirectTokens = 16;

template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const __m256i a = _mm256_set1_epi32(activations);
  return {_mm256_dpbusd_avx_epi32(sums.lo, w.lo, a), _mm256_dpbusd_avx_epi32(sums.hi, w.hi, a)};
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
