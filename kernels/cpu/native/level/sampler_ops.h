// Passes over logits, the part of sampling that is compiled per instruction set.
#pragma once

#include <cstdint>

namespace llamaclust {

inline constexpr int kRankBlock = 64;
// A weight of 1 as an integer. Sums of integers are exact, so no order of summation can change a draw.
inline constexpr int64_t kUnitWeight = int64_t{1} << 40;

struct SamplerOps {
  // blocks[b] = the greatest of x[64 b, 64 b + 64), as far as x[n] goes; returns the greatest of all.
  // With a NaN among them either may be any of them.
  float (*maxima)(const float* x, int n, float* blocks);
  // weight[i] = exp((x[i] - maximum) / divisor) in units of 2^-40, to nearest, ties to even; returns the sum. No x[i] is
  // above maximum. 0 where an x[i] is NaN or maximum is not finite. weights may be null.
  int64_t (*weigh)(const float* x, int n, float maximum, float divisor, int64_t* weights);
  // out[i] = e^x[i] within 1 ulp, as attention, norms and weights above use it; out may be x.
  void (*exp)(const float* x, int n, float* out);
};

}  // namespace llamaclust
