// Scans of Mamba 2, selective state spaces with one decay per head (Dao and Gu, 2024): the part of a level that is
// compiled for each instruction set.
#pragma once

#include <cstddef>

namespace llamaclust {

// Consecutive rows of one head. Pointers are those of the first row; the next row is a stride further.
struct ScanRows {
  float* state;                 // [state_size][head_dim], which every row updates
  const float* x;               // [head_dim]
  const float *b, *c;           // [state_size]
  const float *steps, *decays;  // One value per row.
  float skip;
  float* out;  // [head_dim]
  int rows, head_dim, state_size;
  // In floats: in_stride of x, b and c, out_stride of out.
  ptrdiff_t in_stride, out_stride;
};

struct ScanOps {
  // For n rows: step = ln(1 + e^(step + bias)); decay = e^(step * rate).
  void (*time_steps)(float* steps, float bias, float rate, int n, float* decays);
  // Row after row, for each channel i: state[k][i] = fma(state[k][i], decay, b[k] * (x[i] * step)) for every k, then
  // out[i] = fma(x[i], skip, sum). The sum of state[k][i] * c[k] over k = 0, 1, ... is a chain of fused multiply-adds
  // from 0.
  void (*scan)(const ScanRows& rows);
};

}  // namespace llamaclust
