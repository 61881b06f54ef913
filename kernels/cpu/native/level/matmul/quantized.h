// Products with quantized weights: few tokens straight from the tiles, which are then read at the speed of memory; many
// by panels.
#pragma once

#include "level/matmul/panel.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <class Type, int T>
void multiply_tile(const Product& p, int tile, int first_token, int tokens) {
  const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
  const Activation<Type>* a[T];
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  F32x16 acc[1][T];
  UNROLL for (int t = 0; t < T; t++) acc[0][t] = zero();
  for (int s = 0; s < p.segments; s++) {
    const TileSegment<Type> w[1] = {segment_of<Type>(weights, s, p.segments)};
    add_segment<Type>(w, a, acc);
    UNROLL for (int t = 0; t < T; t++) a[t]++;
  }
  UNROLL for (int t = 0; t < T; t++)
    if (first_token + t < tokens) store_rows(p.output, tile, first_token + t, acc[0][t]);
}

// Up to how many tokens; types that take long to decode say less than others.
template <class Type>
constexpr int direct_tokens() {
  if constexpr (requires { Type::kDirectTokens; })
    return Type::kDirectTokens;
  else
    return kDirectTokens<Type::kBits>;
}

template <class Type>
void multiply_quantized(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch) {
  if (tokens > direct_tokens<Type>()) return multiply_by_panels<Type>(p, tokens, tile_begin, tile_end, scratch);
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
