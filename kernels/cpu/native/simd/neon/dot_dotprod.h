// Integer dot products with sdot, whose operands are both signed.
#pragma once

#include "simd/neon/bytes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Sums = I32x16;
using Scale = I32x16;

template <int kBits>
constexpr int kGroupsPerSum = 64;

constexpr bool kSumsFrom = false;

// Tiles times tokens whose sums fit in the registers, for quantized and for float weights; and up to how many tokens
// decoding a tile again for every eight costs less than a panel.
constexpr int kPanelRows = 1, kPanelTokens = 4;
constexpr int kFloatRows = 1, kFloatTokens = 6;
template <int kBits>
constexpr int kDirectTokens = 16;

DOT Sums no_sums() { return broadcast(0); }
template <int kBits>
DOT Sums step(Sums sums, Bytes w, int32_t activations) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
  EACH_QUARTER(Sums, vdotq_s32(sums.v[i], signed_bytes<kBits>(w.v[i]), a));
}
DOT I32x16 add_sums(I32x16 total, Sums sums) { return add(total, sums); }
DOT Scale make_scale(I32x16 scale) { return scale; }
DOT I32x16 scale_lanes(Scale scale) { return scale; }
DOT I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) {
  EACH_QUARTER(I32x16, vmlaq_s32(total.v[i], sums.v[i], scale.v[i]));
}
// total + scale * (sums - offset); offset is even.
DOT I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add_scaled(total, sub(sums, broadcast(offset)), scale);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
