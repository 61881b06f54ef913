// Rounding to integers.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

inline constexpr int32_t kNotFinite = 0x7f800000;

DEVICE int32_t magnitude(float x) { return __float_as_int(x) & 0x7fffffff; }

// Returns the greatest of x over a warp, or over `lanes` adjacent lanes. x are bits of magnitudes, which have the order
// of the numbers.
template <int lanes = kWarp>
DEVICE int32_t greatest_of(int32_t x) {
  return reduce<lanes>(x, [](int32_t a, int32_t b) { return b > a ? b : a; });
}

// Rounds to nearest, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low bits.
DEVICE int32_t nearest(float x) { return __float_as_int(add(x, 0x1.8p23f)) - 0x4b400000; }

}  // namespace llamaclust::cuda
