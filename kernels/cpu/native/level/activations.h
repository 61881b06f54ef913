// How quantized activations lie in memory, the same for every feature level.
#pragma once

#include "level/quant_types.h"

namespace llamaclust {

// Activations of one segment. q = x * (127 / maximum) to nearest, ties to even; scale = maximum / 127; a maximum below
// 2^-118 counts as zero. A segment with an infinity or a NaN has a NaN scale and zeros.
struct Q8_32 {
  int8_t q[32];
  float scale;
  float scaled_sum;  // scale * sum, one rounding
  int32_t sum;       // of q
};
struct Q8_256 {
  int8_t q[256];
  int32_t sums[16];     // of q, per 16
  int8_t sums_high[8];  // sums per 32 are 128 * high + low, with low in [-64, 63]
  int8_t sums_low[8];
  int8_t sums_16_high[16];  // sums per 16 likewise
  int8_t sums_16_low[16];
  float scale;
  int32_t padding[3];
};
// Weights unpacked for many tokens take up to this many bytes a column and tile, this many tiles at a time.
constexpr int kPanelColumnBytes = 24;
constexpr int kPanelTiles = 4;

static_assert(sizeof(Q8_32) == 44 && alignof(Q8_32) == 4);
static_assert(sizeof(Q8_256) == 384 && alignof(Q8_256) == 4);

}  // namespace llamaclust
