// Quantized activations in the layout of matrix units: one segment of k of eight rows. In 32 columns, lane 4 * row + c
// needs k-group c (columns 4c to 4c + 3) and k-group c + 4 as operand b (mma.cuh). A matrix of activations is [rows / 8
// rounded up][segments]; what it has for missing rows is not used.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

inline constexpr int kGroupRows = 8;

// Quants of 32 columns of eight rows. Both k-groups of a lane are adjacent; or, if instructions of four warps read them
// from shared memory (wgmma.cuh), sixteen columns of all rows precede the other sixteen.
struct Quants {
#if LLAMACLUST_WGMMA
  uint32_t half[2][32];
  DEVICE uint2 operator[](int lane) const { return {half[0][lane], half[1][lane]}; }
  DEVICE uint32_t* group(int row, int g) { return &half[g / 4][4 * row + g % 4]; }
  // Sixteen bytes of a row; `which` is 0 or 1.
  DEVICE const uint32_t* piece(int row, int which) const { return &half[which][4 * row]; }
#else
  uint2 pair[32];
  DEVICE uint2 operator[](int lane) const { return pair[lane]; }
  DEVICE uint32_t* group(int row, int g) { return reinterpret_cast<uint32_t*>(&pair[4 * row + g % 4]) + g / 4; }
  DEVICE const uint32_t* piece(int row, int which) const {
    return reinterpret_cast<const uint32_t*>(&pair[4 * row + 2 * which]);
  }
#endif
  DEVICE uint32_t* piece(int row, int which) {
    return const_cast<uint32_t*>(static_cast<const Quants*>(this)->piece(row, which));
  }
};

struct Activations32 {
  Quants q;
  float scale[8];
  float scaled_sum[8];  // scale * sum of q, rounded once.
};

// Sums of q over 16 columns are 128 * high + low, with low in [-64, 63]. A row has sixteen bytes of each; lane 4 * row
// + c has bytes 4c to 4c + 3.
struct Activations256 {
  Quants q[8];
  uint32_t high[32];
  uint32_t low[32];
  float scale[8];
};

static_assert(sizeof(Activations32) == 320 && sizeof(Activations256) == 2336);  // Multiples of sixteen bytes.

}  // namespace llamaclust::cuda
