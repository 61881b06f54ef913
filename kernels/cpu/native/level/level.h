// The functions of one CPU feature level. The sources in level/ are compiled once per level, each time into a namespace
// of its own (LLAMACLUST_LEVEL). A level exports tables of functions, through which the rest of the program calls it.
// Level code defines nothing else with external linkage: a shared inline function compiled for AVX-512 would be an
// illegal instruction on an older node (cmake/check_isa.cmake fails the build on weak symbols).
#pragma once

#include "level/attention_ops.h"
#include "level/matmul_ops.h"
#include "level/scan_ops.h"
#include "level/state_ops.h"
#include "simd/activations.h"

namespace llamaclust {

// The channels of a head that are rotated together: (2i, 2i + 1) or (i, i + pairs).
enum class RopeStyle : int32_t { Norm = 0, Neox = 1 };

// Elementwise operations of one row x, or of two rows x and y, with a number: x + y, x * y, x * number, tanh(x /
// number) * number, max(x, number) and min(x, number) (NaN for NaN), silu(x) * y, clamped_swiglu(x, y, number), and the
// activation functions of x.
#define LLAMACLUST_ROW_OPS(X) \
  X(add) X(mul) X(scale) X(soft_cap) X(at_least) X(at_most) X(silu_mul) X(clamped_swiglu) LLAMACLUST_ACTIVATIONS(X)

#define NAME(name) name,
enum class RowOp : int32_t { LLAMACLUST_ROW_OPS(NAME) };
#undef NAME

// Row by row arithmetic between matrix products.
struct VectorOps {
  // out = x * (1 / sqrt(mean(x^2) + epsilon)) * weight; out may be x. The squares are summed in 64 interleaved lanes.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* out);
  // out = (x - mean) * (1 / sqrt(mean((x - mean)^2) + epsilon)) * weight + bias, where the last multiplication and the
  // addition are one fma; out may be x. Both sums are taken in 64 interleaved lanes.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float epsilon, int n, float* out);
  // out = one head of x with its first 2 * pairs channels rotated; out may be x. rotation: cos[pairs], then sin[pairs].
  void (*rope)(const float* x, const float* rotation, int pairs, int head_dim, RopeStyle style, float* out);
  // out = op(x, y, number); out may be x or y. y is not read by an operation of one row.
  void (*elementwise)(RowOp op, const float* x, const float* y, float number, int n, float* out);
  // Returns 1 / (1 + exp(-sum)) of the dot product, which is summed in 64 interleaved lanes.
  float (*sigmoid_dot)(const float* x, const float* y, int n);
  // out = fma(x, scale, out).
  void (*add_scaled)(const float* x, float scale, int n, float* out);
  // x = softmax(x) with one exp and one division per value; the sum is taken in 64 interleaved lanes.
  void (*softmax)(float* x, int n);
  // out = exp(weight * softplus(x + bias)); out may be x.
  void (*decay)(const float* x, const float* weight, const float* bias, int n, float* out);
  // out = x * (sqrt(mean(y^2)) / sqrt(max(mean(x^2), epsilon))); out may be x. Sums are taken in 64 interleaved lanes.
  void (*match_magnitude)(const float* x, const float* y, float epsilon, int n, float* out);
  // out = max((x - mean) - factor * sqrt(mean((x - mean)^2)), 0), NaN for NaN; out may be x. Sums are taken in 64
  // interleaved lanes.
  void (*gaussian_top_k)(const float* x, float factor, int n, float* out);
};

inline constexpr int kRankBlock = 64;
// The integer for a weight of 1. Sums of integers are exact, so the order of summation cannot change a draw.
inline constexpr int64_t kUnitWeight = int64_t{1} << 40;

// Passes over logits for sampling.
struct SamplerOps {
  // blocks[b] = the maximum of x[64 b, 64 b + 64) within x[n]; returns the maximum of all. With a NaN in x, the results
  // are arbitrary elements.
  float (*maxima)(const float* x, int n, float* blocks);
  // weights[i] = exp((x[i] - maximum) / divisor) in units of 2^-40, to nearest, ties to even; returns the sum. No x[i]
  // exceeds maximum. Returns 0 if an x[i] is NaN or if maximum is not finite. `weights` may be null.
  int64_t (*weigh)(const float* x, int n, float maximum, float divisor, int64_t* weights);
  // out[i] = e^x[i] with an error below 1 ulp, the exp of attention, norms and the weights above; out may be x.
  void (*exp)(const float* x, int n, float* out);
};

struct NearPoints;

// Whole blocks of weights x [count], finite and at most 65504 in magnitude; and w [count], the importance of an error
// in each.
struct Source {
  const float *x, *w;
  int64_t count;
  const NearPoints* near;  // Nearest points of the type's grid; null without a grid.
  bool has_importance;     // w does not depend on the weights alone.
};

// Quantizes weights to the blocks of a model file. The functions are fixed sequences of IEEE operations, so all levels
// write the same bytes.
struct QuantizeOps {
  // Computes the importance of an error in each of n weights of one row: w = importance * sqrt(mean(x^2) + x^2).
  // `importance` is [n], or null for ones.
  void (*weigh)(const float* x, const float* importance, int n, float* w);
  // Supports all types except float types.
  void (*quantize)(QuantType type, const Source& from, uint8_t* out);
};

struct Level {
  const char* name;  // The name of a member of CpuFeatures (runtime/levels.h).
  MatmulOps matmul;
  VectorOps vector;
  AttentionOps attention;
  SamplerOps sampler;
  QuantizeOps quantize;
  StateOps state;
  ScanOps scan;
};

}  // namespace llamaclust
