// Integer dot products by an instruction that adds four products of bytes to an int32 lane: sums are lanes.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using Sums = I32x16;
using Scale = I32x16;

template <int kBits>
constexpr int kGroupsPerSum = 64;

INLINE Sums no_sums() { return broadcast(0); }
INLINE Sums sums_from(I32x16 x) { return x; }
INLINE I32x16 add_sums(I32x16 total, Sums sums) { return add(total, sums); }
INLINE Scale make_scale(I32x16 scale) { return scale; }
INLINE I32x16 scale_lanes(Scale scale) { return scale; }
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) { return add(total, mul(sums, scale)); }
// total + scale * (sums - offset); offset is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add_scaled(total, sub(sums, broadcast(offset)), scale);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
