// A matrix product for the loops: the location of activations, of segments of tiles (level/quant_types.h) and of output
// rows.
#pragma once

#include "level/matmul_ops.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {

struct Output {
  float* out;
  size_t stride;         // Floats from one line to the next.
  const int32_t* lines;  // Line of each token, or null.
  const float* bias;     // May be null.
  int rows;
};

// One product of any type.
struct Product {
  const uint8_t* tiles;
  size_t tile_bytes;
  const uint8_t* activations;
  size_t activation_stride;         // In bytes.
  const int32_t* activation_lines;  // Line of each token, or null.
  int segments;
  Prefetch prefetch;
  Output output;
};

namespace {

INLINE Product product_of(const TileLayout& layout, const Matrix& weights, const uint8_t* activations,
                          const TokenLines& lines, float* out, size_t out_stride, const float* bias,
                          Prefetch prefetch) {
  return {weights.tiles,
          weights.tile_bytes,
          activations,
          activation_bytes(layout.activation, weights.cols),
          lines.activations,
          weights.cols / layout.segment_cols,
          prefetch,
          {out, out_stride, lines.out, bias, weights.rows}};
}

// Returns the line of a token; `lines` may be null (TokenLines).
INLINE size_t line_of(const int32_t* lines, int token) {
  return static_cast<size_t>(lines ? lines[token] : token);
}

// Replaces every NaN by the same one. Otherwise its payload would depend on the operand order that the compiler
// chooses.
INLINE F32x16 canonical(F32x16 x) {
  const F32x16 infinity = broadcast(__builtin_inff()), nan = broadcast(__builtin_nanf(""));
  return select_less(x, infinity, x, select_less(zero(), x, x, nan));
}

INLINE void store_rows(const Output& output, int tile, int token, F32x16 x) {
  const int first_row = tile * kTileRows, rows = output.rows - first_row;
  float* out = output.out + line_of(output.lines, token) * output.stride + first_row;
  if (rows >= kTileRows) {
    if (output.bias) x = add(x, load(output.bias + first_row));
    store(out, canonical(x));
  } else {
    if (output.bias) x = add(x, load_first(rows, output.bias + first_row));
    store_first(rows, out, canonical(x));
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
