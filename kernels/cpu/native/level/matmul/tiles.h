// A product as its loops see it: where the tokens, the segments of a tile (level/quant_types.h) and finished rows are.
#pragma once

#include "level/matmul/segment.h"
#include "level/matmul_ops.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Of a token among lines that may be given by TokenLines.
INLINE size_t line_of(const int32_t* lines, int token) {
  return static_cast<size_t>(lines ? lines[token] : token);
}

struct Output {
  float* out;
  size_t stride;         // from one line to the next
  const int32_t* lines;  // of the tokens, or null
  const float* bias;     // or null
  int rows;
};

// Every NaN becomes the same one: which payload survives an operation is the compiler's choice of operand order.
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

template <class Type>
using Activation = std::conditional_t<Type::kLayout.activation == ActivationFormat::F32, float,
                                      std::conditional_t<kWide<Type>, Q8_256, Q8_32>>;

// One product, of any type.
struct Product {
  const uint8_t* tiles;
  size_t tile_bytes;
  const uint8_t* activations;
  size_t activation_stride;         // bytes
  const int32_t* activation_lines;  // of the tokens, or null
  int segments;
  Output output;
};

// Where a token's activations begin; tokens past the last are computed like it and thrown away.
template <class Type>
DECODE const Activation<Type>* token_activations(const Product& p, int token, int tokens) {
  const size_t line = line_of(p.activation_lines, token < tokens ? token : tokens - 1);
  return reinterpret_cast<const Activation<Type>*>(p.activations + line * p.activation_stride);
}

template <class Type>
DECODE TileSegment<Type> segment_of(const uint8_t* tile, int s, int segments) {
  constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
  constexpr int group = Type::kLayout.group_segments();
  const int first = s / group * group, count = segments - first < group ? segments - first : group;
  const uint8_t* bodies = tile + static_cast<size_t>(first) * (body_bytes + tail_bytes);
  return {bodies + (s - first) * body_bytes, bodies + count * body_bytes + (s - first) * tail_bytes};
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
