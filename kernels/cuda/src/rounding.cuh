// Numbers that are rounded to whole ones.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

inline constexpr int32_t kNotFinite = 0x7f800000;

DEVICE int32_t magnitude(float x) { return __float_as_int(x) & 0x7fffffff; }

// The greatest magnitude's bits in a warp, or of `lanes` neighbours: magnitudes of floats are in the order of their bits.
template <int lanes = kWarp>
DEVICE int32_t greatest_of(int32_t x) {
  return reduce<lanes>(x, [](int32_t a, int32_t b) { return b > a ? b : a; });
}

// To nearest, ties to even, for |x| < 2^22: by 1.5 * 2^23 the integer is in the low bits.
DEVICE int32_t nearest(float x) { return __float_as_int(add(x, 0x1.8p23f)) - 0x4b400000; }

}  // namespace llamaclust::cuda
