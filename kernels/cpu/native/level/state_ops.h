// States of sequences, which every row updates: the part of a level that is compiled per instruction set.
#pragma once

namespace llamaclust {

inline constexpr int kMaxTaps = 16;  // of a convolution

inline constexpr int kMaxKeyChannels = 256;  // of a delta rule's heads
inline constexpr int kDeltaChannels = 32;    // of a head's values that are computed together

// Rows of one head in order: state [keys][channels] of up to kDeltaChannels value channels, and pointers to what the
// first row has; the next row has it `*_width` floats on.
struct DeltaRows {
  int rows, keys, channels;  // channels: 16 or 32
  float* state;
  const float *q, *k;  // [keys]
  const float* v;      // [channels]
  const float* decay;  // one number, or [keys] where they are `per_key`
  const float* beta;   // one number
  float* out;          // [channels]
  int key_width, value_width, decay_width, beta_width;
  bool per_key;
};

struct StateOps {
  // out[i] = bias[i] + the sum over taps t = 0, 1, ... of x[t][i] * weight[t * stride + i], one fused operation each;
  // without a bias the first product is rounded by itself.
  void (*convolve)(const float* const* x, const float* weight, int stride, const float* bias, int taps, int n,
                   float* out);
  // Of each row, with sums over keys in order, one fused operation each, from 0:
  //   seen = the sum of state[key] * (decay[key] * k[key]); delta = (v - seen) * beta;
  //   state[key] = fma(k[key], delta, state[key] * decay[key]); out = the sum of state[key] * q[key].
  void (*delta_rule)(const DeltaRows& rows);
};

}  // namespace llamaclust
