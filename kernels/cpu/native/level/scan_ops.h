// Scans of Mamba 2, selective state spaces whose decay is one number a head (Dao and Gu, 2024): the part of a level that
// is compiled per instruction set.
#pragma once

#include <cstddef>

namespace llamaclust {

// Rows of one head in their order: pointers to what the first one has; the next row has it a stride on.
struct ScanRows {
  float* state;     // [state_size][head_dim], which every row updates
  const float* x;   // [head_dim]
  const float *b, *c;          // [state_size]
  const float *steps, *decays;  // one number for each row
  float skip;
  float* out;  // [head_dim]
  int rows, head_dim, state_size;
  ptrdiff_t in_stride, out_stride;  // floats, of x, b and c and of out
};

struct ScanOps {
  // Of n rows: step = ln(1 + e^(step + bias)); decay = e^(step * rate).
  void (*time_steps)(float* steps, float bias, float rate, int n, float* decays);
  // Row after row, for each channel i: state[k][i] = fma(state[k][i], decay, b[k] * (x[i] * step)) for every k; out[i] =
  // fma(x[i], skip, the sum over k = 0, 1, ... of state[k][i] * c[k]), one fused operation each, from 0.
  void (*scan)(const ScanRows& rows);
};

}  // namespace llamaclust
