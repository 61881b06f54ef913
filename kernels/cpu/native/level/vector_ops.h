// Row by row arithmetic between the matrix products, the part of a level that is compiled per instruction set.
#pragma once

#include <cstdint>

#include "simd/activations.h"

namespace llamaclust {

// Which channels of a head rotate together: (2i, 2i + 1) or (i, i + pairs).
enum class RopeStyle : int32_t { Norm = 0, Neox = 1 };

// Elementwise operations of one row x or of two, x and y, with a number: x + y, x * y, x * number,
// tanh(x / number) * number, silu(x) * y, and the activation functions of x.
#define LLAMACLUST_ROW_OPS(X) X(add) X(mul) X(scale) X(soft_cap) X(silu_mul) LLAMACLUST_ACTIVATIONS(X)

#define NAME(name) name,
enum class RowOp : int32_t { LLAMACLUST_ROW_OPS(NAME) };
#undef NAME

struct VectorOps {
  // out = x * (1 / sqrt(mean(x^2) + epsilon)) * weight; out may be x. The squares are summed in 64 interleaved lanes.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* out);
  // out = (x - mean) * (1 / sqrt(mean((x - mean)^2) + epsilon)) * weight + bias, the last two one operation; out may be
  // x. Both sums are taken in 64 interleaved lanes.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int n, float* out);
  // out = one head of x with its first 2 * pairs channels rotated; out may be x. rotation: cos[pairs], then sin[pairs].
  void (*rope)(const float* x, const float* rotation, int pairs, int head_dim, RopeStyle style, float* out);
  // out = op(x, y, number); out may be x or y. y is not read where the operation has one row.
  void (*elementwise)(RowOp op, const float* x, const float* y, float number, int n, float* out);
  // 1 / (1 + exp(-sum)) of the products' sum in 64 interleaved lanes.
  float (*sigmoid_dot)(const float* x, const float* y, int n);
  // out = fma(x, scale, out).
  void (*add_scaled)(const float* x, float scale, int n, float* out);
  // x = softmax(x), one exp and one division a value; the sum is taken in 64 interleaved lanes.
  void (*softmax)(float* x, int n);
};

}  // namespace llamaclust
