// Row by row arithmetic between the matrix products, the part of a level that is compiled per instruction set.
#pragma once

#include <cstdint>

namespace llamaclust {

// Which channels of a head rotate together: (2i, 2i + 1) or (i, i + pairs).
enum class RopeStyle : int32_t { Norm = 0, Neox = 1 };

// Of what function of x a GELU is the product with x.
enum class GeluKind : int32_t { Erf = 0, Tanh = 1 };

struct VectorOps {
  // out = x * (1 / sqrt(mean(x^2) + epsilon)) * weight; out may be x. The squares are summed in 64 interleaved lanes.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* out);
  // out = (x - mean) * (1 / sqrt(mean((x - mean)^2) + epsilon)) * weight + bias, the last two one operation; out may be
  // x. Both sums are taken in 64 interleaved lanes.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int n, float* out);
  // out = one head of x with its first 2 * pairs channels rotated; out may be x. rotation: cos[pairs], then sin[pairs].
  void (*rope)(const float* x, const float* rotation, int pairs, int head_dim, RopeStyle style, float* out);
  // out = gate / (1 + exp(-gate)) * up; out may be gate or up.
  void (*silu_mul)(const float* gate, const float* up, int n, float* out);
  // out = gelu(x); out may be x.
  void (*gelu)(const float* x, GeluKind kind, int n, float* out);
  // out = x + y; out may be either.
  void (*add)(const float* x, const float* y, int n, float* out);
  // out = x * y; out may be either.
  void (*mul)(const float* x, const float* y, int n, float* out);
  // out = x * factor; out may be x.
  void (*scale)(const float* x, float factor, int n, float* out);
  // out = tanh(x / cap) * cap; out may be x.
  void (*soft_cap)(const float* x, float cap, int n, float* out);
  // 1 / (1 + exp(-sum)) of the products' sum in 64 interleaved lanes.
  float (*sigmoid_dot)(const float* x, const float* y, int n);
  // out = fma(x, scale, out).
  void (*add_scaled)(const float* x, float scale, int n, float* out);
  // x = softmax(x), one exp and one division a value; the sum is taken in 64 interleaved lanes.
  void (*softmax)(float* x, int n);
};

}  // namespace llamaclust
