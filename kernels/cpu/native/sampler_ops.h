// Reductions over logits, the part of sampling that is compiled per instruction set.
#pragma once

namespace llamaclust {

struct SamplerOps {
  float (*maximum)(const float* x, int n);
  // Sum of exp(x[i] - shift) over i: 64 interleaved lanes, then a fixed tree (docs/numerics.md).
  float (*sum_exp)(const float* x, int n, float shift);
};

}  // namespace llamaclust
