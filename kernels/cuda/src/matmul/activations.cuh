// Quantized activations as matrix units take them: eight rows and one segment of k together, quants in the order in
// which lanes hold `b` (mma.cuh). Of 32 columns, lane 4 * row + c has k-group c (columns 4 c to 4 c + 3) and k-group c
// + 4. A matrix of them is [rows / 8 rounded up][segments]; what stands for rows that are not there is never looked at.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

inline constexpr int kGroupRows = 8;

struct Activations32 {
  uint2 q[32];
  float scale[8];
  float scaled_sum[8];  // scale * sum of q, one rounding
};

// Sums of q over 16 columns are 128 * high + low with low in [-64, 63]: sixteen bytes a row, lane 4 * row + c has 4 c
// to 4 c + 3.
struct Activations256 {
  uint2 q[8][32];
  uint32_t high[32];
  uint32_t low[32];
  float scale[8];
};

static_assert(sizeof(Activations32) == 320 && sizeof(Activations256) == 2336);  // whole pieces of sixteen bytes

}  // namespace llamaclust::cuda
