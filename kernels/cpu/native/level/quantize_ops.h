// Weights into the blocks of a model file, the part of a level that is compiled per instruction set. Every result is a
// fixed list of IEEE operations, so all levels write the same bytes.
#pragma once

#include <cstdint>

#include "level/matmul_ops.h"

namespace llamaclust {

struct NearPoints;

// Whole blocks of weights x [count], finite and no larger than 65504, and how much an error at each of them matters.
struct Source {
  const float *x, *w;
  int64_t count;
  const NearPoints* near;  // what points of the type's grid lie near; null where it has none
  bool has_importance;     // w depends on more than the weights
};

struct QuantizeOps {
  // How much an error at each of n weights of one row matters: w = importance * sqrt(mean(x^2) + x^2). `importance` is
  // [n] or null, for ones.
  void (*weigh)(const float* x, const float* importance, int n, float* w);
  // For every type but those of floats.
  void (*quantize)(QuantType type, const Source& from, uint8_t* out);
};

}  // namespace llamaclust
