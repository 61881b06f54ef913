// Integer dot products with vpdpbusd.
#pragma once

#include "simd/avx512/bytes.h"
#include "simd/dot_int32.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <int kBits>
constexpr bool kCentred = false;
constexpr bool kSumsFrom = true;

constexpr int kPanelRows = 2, kPanelTokens = 6;
constexpr int kFloatRows = 4, kFloatTokens = 4;
template <int kBits>
constexpr int kDirectTokens = kBits == 2 || kBits == 4 ? 128 : 32;

template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  return _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(activations));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
