// Integer dot products with vpdpbusd in 256 bits.
#pragma once

#include "simd/avx2/bytes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Sums = I32x16;
using Scale = I32x16;

template <int kBits>
constexpr int kGroupsPerSum = 64;
// Whether `step` takes bytes of eight bits as signed, less 128, so that the caller need not subtract it.
template <int kBits>
constexpr bool kCentred = false;

// Whether sums may begin with any int32: with what an offset takes off.
constexpr bool kSumsFrom = true;
DOT Sums sums_from(I32x16 x) { return x; }

// Tiles times tokens whose sums fit in the registers, for quantized and for float weights; and up to how many tokens
// decoding a tile again for every eight costs less than a panel.
constexpr int kPanelRows = 1, kPanelTokens = 4;
constexpr int kFloatRows = 1, kFloatTokens = 5;
template <int kBits>
constexpr int kDirectTokens = 16;

DOT Sums no_sums() { return broadcast(0); }
template <int kBits>
DOT Sums step(Sums sums, Bytes w, int32_t activations) {
  const __m256i a = _mm256_set1_epi32(activations);
  return {_mm256_dpbusd_avx_epi32(sums.lo, w.lo, a), _mm256_dpbusd_avx_epi32(sums.hi, w.hi, a)};
}
DOT I32x16 add_sums(I32x16 total, Sums sums) { return add(total, sums); }
DOT Scale make_scale(I32x16 scale) { return scale; }
DOT I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) { return add(total, mul(sums, scale)); }
DOT I32x16 scale_lanes(Scale scale) { return scale; }
// total + scale * (sums - offset); offset is even.
DOT I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add(total, mul(sub(sums, broadcast(offset)), scale));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
