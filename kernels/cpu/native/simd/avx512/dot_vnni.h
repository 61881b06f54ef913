// Integer dot products with vpdpbusd.
#pragma once

#include "simd/avx512/bytes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Sums = __m512i;
using Scale = __m512i;

template <int kBits>
constexpr int kGroupsPerSum = 64;
// Whether `step` takes bytes of eight bits as signed, less 128, so that the caller need not subtract it.
template <int kBits>
constexpr bool kCentred = false;

// Whether sums may begin with any int32: with what an offset takes off.
constexpr bool kSumsFrom = true;
DOT Sums sums_from(I32x16 x) { return x; }

// Tiles times tokens whose sums fit in the registers, for quantized and for float weights; and up to how many tokens
// decoding a tile again for every eight costs less than a panel: longer for quants that are not put together of parts.
constexpr int kPanelRows = 2, kPanelTokens = 6;
constexpr int kFloatRows = 4, kFloatTokens = 4;
template <int kBits>
constexpr int kDirectTokens = kBits == 2 || kBits == 4 ? 128 : 32;

DOT Sums no_sums() { return _mm512_setzero_si512(); }
template <int kBits>
DOT Sums step(Sums sums, Bytes w, int32_t activations) {
  return _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(activations));
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
