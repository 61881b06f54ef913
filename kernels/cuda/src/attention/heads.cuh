// Transformations of queries and keys before attention.
#pragma once

#include "elementwise/norm.cuh"
#include "elementwise/rope.cuh"

namespace llamaclust::cuda {

// Norm of each head, with a weight [head_dim]; null for none.
struct HeadNorm {
  const float* weight;
  float epsilon;
};

// A norm of each head, followed by a rotation. The angles start with those of row 0.
struct HeadTransform {
  HeadNorm of_queries, of_key;
  Rotation rotation;
};

// Transforms queries [heads, head_dim] and a key of a row in place. All `threads` threads call it together, and are
// synchronized at its end. It is not inlined, because values that it computes from its arguments would take registers
// from the sums of attention.
template <int threads>
DEVICE_CALL void transform_heads(HeadTransform by, int row, float* queries, int heads, float* key, int head_dim) {
  const auto head = [=](int i) { return i < heads ? queries + i * head_dim : key; };
  if (by.of_queries.weight != nullptr || by.of_key.weight != nullptr) {
    for (int i = threadIdx.x / kWarp; i <= heads; i += threads / kWarp) {
      const HeadNorm norm = i < heads ? by.of_queries : by.of_key;
      if (norm.weight != nullptr) norm_by_warp(head(i), norm.weight, norm.epsilon, head_dim, head(i));
    }
    __syncthreads();
  }
  if (by.rotation.angles == nullptr) return;
  const int pairs = by.rotation.pairs;
  const Rotation own{by.rotation.angles + 2 * pairs * row, pairs, by.rotation.neox};
  for (int i = threadIdx.x; i < (heads + 1) * pairs; i += threads) own.turn(head(i / pairs), i % pairs);
  __syncthreads();
}

#define HEAD_ARGUMENTS                                                                                                \
  const float *angles, int32_t pairs, int32_t neox, const float *query_norm, float query_epsilon,                     \
      const float *key_norm, float key_epsilon
#define HEAD_TRANSFORM {{query_norm, query_epsilon}, {key_norm, key_epsilon}, {angles, pairs, neox}}

}  // namespace llamaclust::cuda
