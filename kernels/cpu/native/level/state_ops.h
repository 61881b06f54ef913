// States of sequences, which every row updates: the part of a level that is compiled for each instruction set.
#pragma once

namespace llamaclust {

inline constexpr int kMaxTaps = 16;  // Taps of a convolution.

inline constexpr int kMaxKeyChannels = 256;  // Key channels of a head in a delta rule.
inline constexpr int kDeltaChannels = 32;    // Value channels of a head that are computed together.

// Consecutive rows of one head, with a state [keys][channels] of up to kDeltaChannels value channels. Pointers are
// those of the first row; the next row is `*_width` floats further.
struct DeltaRows {
  int rows, keys, channels;  // channels: 16 or 32
  float* state;
  const float *q, *k;  // [keys]
  const float* v;      // [channels]
  const float* decay;  // One value, or [keys] if `per_key`.
  const float* beta;   // One value.
  float* out;          // [channels]
  int key_width, value_width, decay_width, beta_width;
  bool per_key;
};

struct StateOps {
  // out[i] = bias[i] + the sum of x[t][i] * weight[t * stride + i] over taps t = 0, 1, ..., as a chain of fused
  // multiply-adds. Without a bias, the first product is rounded by itself.
  void (*convolve)(const float* const* x, const float* weight, int stride, const float* bias, int taps, int n,
                   float* out);
  // For each row, with sums over keys that are chains of fused multiply-adds from 0:
  //   seen = the sum of state[key] * (decay[key] * k[key]); delta = (v - seen) * beta;
  //   state[key] = fma(k[key], delta, state[key] * decay[key]); out = the sum of state[key] * q[key].
  void (*delta_rule)(const DeltaRows& rows);
};

}  // namespace llamaclust
