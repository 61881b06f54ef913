// Integer dot products on NEON of any ARMv8 processor: one 16-bit sum a column.
#pragma once

#include "simd/neon/bytes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Sums {
  int16x8_t v[8];  // [two rows][4 columns]
};
using Scale = I32x16;

// 127 * the greatest byte (128 for eight bits, see signed_bytes) * groups stays below 32768.
template <int kBits>
constexpr int kGroupsPerSum = kBits <= 4 ? 16 : kBits == 5 ? 8 : kBits == 6 ? 4 : 2;

constexpr bool kSumsFrom = false;

constexpr int kPanelRows = 1, kPanelTokens = 2;
constexpr int kFloatRows = 1, kFloatTokens = 6;
template <int kBits>
constexpr int kDirectTokens = 16;

INLINE Sums no_sums() {
  const int16x8_t none = vdupq_n_s16(0);
  return {{none, none, none, none, none, none, none, none}};
}
template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
  const auto low = [&](int i) __attribute__((always_inline)) {
    return vmlal_s8(sums.v[2 * i], vget_low_s8(signed_bytes<kBits>(w.v[i])), vget_low_s8(a));
  };
  const auto high = [&](int i) __attribute__((always_inline)) {
    return vmlal_high_s8(sums.v[2 * i + 1], signed_bytes<kBits>(w.v[i]), a);
  };
  return {{low(0), high(0), low(1), high(1), low(2), high(2), low(3), high(3)}};
}
INLINE I32x16 in_lanes(Sums sums) {
  EACH_QUARTER(I32x16, vpaddq_s32(vpaddlq_s16(sums.v[2 * i]), vpaddlq_s16(sums.v[2 * i + 1])));
}
INLINE I32x16 add_sums(I32x16 total, Sums sums) { return add(total, in_lanes(sums)); }
INLINE Scale make_scale(I32x16 scale) { return scale; }
INLINE I32x16 scale_lanes(Scale scale) { return scale; }
INLINE I32x16 add_scaled(I32x16 total, I32x16 sums, Scale scale) {
  EACH_QUARTER(I32x16, vmlaq_s32(total.v[i], sums.v[i], scale.v[i]));
}
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) { return add_scaled(total, in_lanes(sums), scale); }
// total + scale * (sums - offset); offset is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add_scaled(total, sub(in_lanes(sums), broadcast(offset)), scale);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
