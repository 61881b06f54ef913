// States of sequences, which every row updates: the part of a level that is compiled per instruction set.
#pragma once

namespace llamaclust {

inline constexpr int kMaxTaps = 16;  // of a convolution

struct StateOps {
  // out[i] = bias[i] + the sum over taps t = 0, 1, ... of x[t][i] * weight[t * stride + i], one fused operation each;
  // without a bias the first product is rounded by itself.
  void (*convolve)(const float* const* x, const float* weight, int stride, const float* bias, int taps, int n,
                   float* out);
};

}  // namespace llamaclust
