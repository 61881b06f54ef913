// Numbers that are rounded to whole ones: what keys and values in q8_0, and queries that meet them, share.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

inline constexpr int32_t kNotFinite = 0x7f800000;
inline constexpr int32_t kLeastQuery = 0x0d800000;  // 2^-100: below it a group of a query counts as zero

// Bits of the greatest magnitude in a warp: magnitudes of floats are in the order of their bits.
DEVICE int32_t greatest_magnitude(float x) {
  int32_t greatest = __float_as_int(x) & 0x7fffffff;
#pragma unroll
  for (int with = kWarp / 2; with > 0; with /= 2) {
    const int32_t other = __shfl_xor_sync(kAllLanes, greatest, with);
    greatest = other > greatest ? other : greatest;
  }
  return greatest;
}

// To nearest, ties to even, for |x| < 2^22.
DEVICE int32_t nearest(float x) { return __float_as_int(add(x, 0x1.8p23f)) - 0x4b400000; }

}  // namespace llamaclust::cuda
