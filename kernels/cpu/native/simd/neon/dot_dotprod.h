// Integer dot products with sdot, whose operands are both signed.
#pragma once

#include "simd/neon/bytes.h"
#include "simd/dot_int32.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr bool kSumsFrom = false;

constexpr int kPanelRows = 1, kPanelTokens = 4;
constexpr int kFloatRows = 1, kFloatTokens = 6;
template <int kBits>
constexpr int kDirectTokens = 16;

template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
  EACH_QUARTER(Sums, vdotq_s32(sums.v[i], signed_bytes<kBits>(w.v[i]), a));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
