// Products with quantized weights: few tokens straight from the tiles, which are then read at the speed of memory.
#pragma once

#include "matmul_store.h"
#include "matmul_tiles.h"

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
  int segments;
  Output output;
};

// Where a token's activations begin; tokens past the last are computed like it and thrown away.
template <class Type>
DECODE const Activation<Type>* token_activations(const Product& p, int token, int tokens) {
  const int t = token < tokens ? token : tokens - 1;
  return reinterpret_cast<const Activation<Type>*>(p.activations + static_cast<size_t>(t) * p.activation_stride);
}

// Nine kilobytes ahead: what the tiles' reader needs on a fast memory; the cache takes the rest.
constexpr int kPrefetchBytes = 9216;

template <class Type, int T>
void multiply_tile(const Product& p, int tile, int first_token, int tokens) {
  const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
  const Activation<Type>* a[T];
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  F32x16 acc[1][T];
  UNROLL for (int t = 0; t < T; t++) acc[0][t] = zero();
  for (int s = 0; s < p.segments; s++) {
    constexpr int bytes = Type::kLayout.body_bytes + Type::kLayout.tail_bytes;
    const uint8_t* ahead = weights + static_cast<size_t>(s) * bytes + kPrefetchBytes;
    UNROLL for (int line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line);
    const TileSegment<Type> w[1] = {segment_of<Type>(weights, s, p.segments)};
    add_segment<Type>(w, a, acc);
    UNROLL for (int t = 0; t < T; t++) a[t]++;
  }
  UNROLL for (int t = 0; t < T; t++)
    if (first_token + t < tokens) store_rows(p.output, tile, first_token + t, acc[0][t]);
}

template <class Type>
void multiply_quantized(const Product& p, int tokens, int tile_begin, int tile_end) {
  for (int tile = tile_begin; tile < tile_end; tile++) {
    int t = 0;
    for (; t + 4 < tokens; t += 8) multiply_tile<Type, 8>(p, tile, t, tokens);
    switch (tokens - t) {
      case 1: multiply_tile<Type, 1>(p, tile, t, tokens); break;
      case 2: multiply_tile<Type, 2>(p, tile, t, tokens); break;
      case 3:
      case 4: multiply_tile<Type, 4>(p, tile, t, tokens); break;
      default: break;
    }
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
