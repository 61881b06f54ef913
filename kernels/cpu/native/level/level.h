// What one CPU feature level provides. The sources in level/ are compiled once per level, each into its own namespace
// (LLAMACLUST_LEVEL), and every level exports one table of functions; the rest of the program calls through the table.
// Level code defines nothing with external linkage but its op tables: a shared inline function compiled for AVX-512
// would be an illegal instruction on an older node (cmake/check_isa.cmake fails the build on weak symbols).
#pragma once

#include "level/attention_ops.h"
#include "level/matmul_ops.h"
#include "level/scan_ops.h"
#include "level/state_ops.h"
#include "simd/activations.h"

namespace llamaclust {

// Which channels of a head rotate together: (2i, 2i + 1) or (i, i + pairs).
enum class RopeStyle : int32_t { Norm = 0, Neox = 1 };

// Elementwise operations of one row x or of two, x and y, with a number: x + y, x * y, x * number,
// tanh(x / number) * number, silu(x) * y, clamped_swiglu(x, y, number), and the activation functions of x.
#define LLAMACLUST_ROW_OPS(X) \
  X(add) X(mul) X(scale) X(soft_cap) X(silu_mul) X(clamped_swiglu) LLAMACLUST_ACTIVATIONS(X)

#define NAME(name) name,
enum class RowOp : int32_t { LLAMACLUST_ROW_OPS(NAME) };
#undef NAME

// Row by row arithmetic between the matrix products.
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
  // out = exp(weight * softplus(x + bias)); out may be x.
  void (*decay)(const float* x, const float* weight, const float* bias, int n, float* out);
  // out = x * (sqrt(mean(y^2)) / sqrt(max(mean(x^2), epsilon))); out may be x. Sums are taken in 64 interleaved lanes.
  void (*match_magnitude)(const float* x, const float* y, float epsilon, int n, float* out);
  // out = max((x - mean) - factor * sqrt(mean((x - mean)^2)), 0), NaN of NaN; out may be x. Likewise.
  void (*gaussian_top_k)(const float* x, float factor, int n, float* out);
};

inline constexpr int kRankBlock = 64;
// A weight of 1 as an integer. Sums of integers are exact, so no order of summation can change a draw.
inline constexpr int64_t kUnitWeight = int64_t{1} << 40;

// Passes over logits for sampling.
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

struct NearPoints;

// Whole blocks of weights x [count], finite and no larger than 65504, and how much an error at each of them matters.
struct Source {
  const float *x, *w;
  int64_t count;
  const NearPoints* near;  // what points of the type's grid lie near; null where it has none
  bool has_importance;     // w depends on more than the weights
};

// Weights into the blocks of a model file: fixed lists of IEEE operations, so all levels write the same bytes.
struct QuantizeOps {
  // How much an error at each of n weights of one row matters: w = importance * sqrt(mean(x^2) + x^2). `importance` is
  // [n] or null, for ones.
  void (*weigh)(const float* x, const float* importance, int n, float* w);
  // For every type but those of floats.
  void (*quantize)(QuantType type, const Source& from, uint8_t* out);
};

struct Level {
  const char* name;  // one of CpuFeatures (runtime/levels.h)
  MatmulOps matmul;
  VectorOps vector;
  AttentionOps attention;
  SamplerOps sampler;
  QuantizeOps quantize;
  StateOps state;
  ScanOps scan;
};

}  // namespace llamaclust
