// Row by row arithmetic between the matrix products, the part of a level that is compiled per instruction set.
#pragma once

#include <cstdint>

namespace llamaclust {

// Which channels of a head rotate together: (2i, 2i + 1) or (i, i + pairs).
enum class RopeStyle : int32_t { Norm = 0, Neox = 1 };

struct VectorOps {
  // out = x * (1 / sqrt(mean(x^2) + epsilon)) * weight; out may be x. The squares are summed in 64 interleaved lanes.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* out);
  // out = one head of x with its first 2 * pairs channels rotated; out may be x. rotation: cos[pairs], then sin[pairs].
  void (*rope)(const float* x, const float* rotation, int pairs, int head_dim, RopeStyle style, float* out);
  // out = gate / (1 + exp(-gate)) * up; out may be gate or up.
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  // out = x + y; out may be either.
  void (*add)(const float* x, const float* y, int n, float* out);
  // out = fma(x, scale, out).
  void (*add_scaled)(const float* x, float scale, int n, float* out);
  // x = softmax(x), one exp and one division a value; the sum is taken in 64 interleaved lanes.
  void (*softmax)(float* x, int n);
};

}  // namespace llamaclust
