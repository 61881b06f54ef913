// Quantizes activations to int8 with one scale per segment, with the arithmetic of
// kernels/cpu/native/level/matmul/matmul.cpp and the layout of activations.cuh. A warp has 256 columns of a row, a lane
// eight of them.
#pragma once

#include "matmul/activations.cuh"
#include "rounding.cuh"

namespace llamaclust::cuda {

inline constexpr int32_t kSmallestMaximum = 0x04800000;  // 2^-118: a segment with a smaller maximum counts as 0.

struct SegmentScale {
  float scale;
  float inverse;  // If 0, every q is 0.
};

DEVICE SegmentScale scale_of(int32_t greatest) {
  if (greatest >= kNotFinite) return {__int_as_float(0x7fc00000), 0.0f};
  if (greatest < kSmallestMaximum) return {0.0f, 0.0f};
  const float maximum = __int_as_float(greatest);
  return {div(maximum, 127.0f), div(127.0f, maximum)};
}

DEVICE int32_t quant_of(float x, float inverse) { return inverse == 0.0f ? 0 : nearest(mul(x, inverse)); }

// Eight columns of one row.
using Eight = float[8];

// Eight quantized columns as two k-groups, and their sum.
struct QuantizedEight {
  uint32_t groups[2];
  int32_t sum;
  float scale;
};

// `lanes` lanes have one segment together.
template <int lanes>
DEVICE QuantizedEight quantize_eight(const Eight& values) {
  int32_t greatest = 0;
  for (int i = 0; i < 8; i++) greatest = magnitude(values[i]) > greatest ? magnitude(values[i]) : greatest;
  const SegmentScale s = scale_of(greatest_of<lanes>(greatest));
  QuantizedEight r = {{0, 0}, 0, s.scale};
  for (int i = 0; i < 8; i++) {
    const int32_t q = quant_of(values[i], s.inverse);
    r.groups[i / 4] |= static_cast<uint32_t>(q & 255) << i % 4 * 8;
    r.sum += q;
  }
  return r;
}

// Lane n of four has k-groups 2n and 2n + 1 of 32 columns.
DEVICE void store_groups(const QuantizedEight& eight, int row, int n, Quants& q) {
  for (int i = 0; i < 2; i++) *q.group(row, 2 * n + i) = eight.groups[i];
}

// Quantizes columns 256 * piece to 256 * piece + 255 of a row. Values beyond the last column are 0.
DEVICE void quantize(const Eight& values, int row, int piece, int cols, Activations256* out) {
  const int place = row % kGroupRows, lane = threadIdx.x % kWarp;
  Activations256& to = out[static_cast<size_t>(row / kGroupRows) * (cols / 256) + piece];
  const QuantizedEight eight = quantize_eight<32>(values);
  store_groups(eight, place, lane % 4, to.q[lane / 4]);
  const int32_t sum = eight.sum + __shfl_xor_sync(kAllLanes, eight.sum, 1);
  const int32_t high = (sum + 64) >> 7;
  if (lane % 2 == 0) {
    reinterpret_cast<int8_t*>(to.high)[16 * place + lane / 2] = static_cast<int8_t>(high);
    reinterpret_cast<int8_t*>(to.low)[16 * place + lane / 2] = static_cast<int8_t>(sum - 128 * high);
  }
  if (lane == 0) to.scale[place] = eight.scale;
}

DEVICE void quantize(const Eight& values, int row, int piece, int cols, Activations32* out) {
  const int place = row % kGroupRows, lane = threadIdx.x % kWarp, segment = 8 * piece + lane / 4;
  const QuantizedEight eight = quantize_eight<4>(values);
  int32_t sum = eight.sum + __shfl_xor_sync(kAllLanes, eight.sum, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  if (32 * segment >= cols) return;
  Activations32& to = out[static_cast<size_t>(row / kGroupRows) * (cols / 32) + segment];
  store_groups(eight, place, lane % 4, to.q);
  if (lane % 4 != 0) return;
  to.scale[place] = eight.scale;
  to.scaled_sum[place] = mul(eight.scale, __int2float_rn(sum));
}

}  // namespace llamaclust::cuda
