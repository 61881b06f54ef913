// A product with quantized weights as its loops see it, and where the segments of a tile stand (see matrix.h).
#pragma once

#include "level/matmul/segment.h"
#include "level/matmul/store.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <class Type, bool wide = kWide<Type>>
struct ActivationOf {
  using type = Q8_32;
};
template <class Type>
struct ActivationOf<Type, true> {
  using type = Q8_256;
};
template <class Type>
using Activation = typename ActivationOf<Type>::type;

// One product as the loops below see it.
struct Product {
  const uint8_t* tiles;
  size_t tile_bytes;
  const uint8_t* activations;
  size_t activation_stride;
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
