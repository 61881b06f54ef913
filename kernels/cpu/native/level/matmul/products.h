// The loops of products. Few tokens are multiplied directly from the tiles, at the speed of memory; many tokens with
// quantized weights, through panels.
#pragma once

#include "level/matmul/panels.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Float weights: one fused multiply-add per weight, in the order of k.
struct F32 {
  static constexpr TileLayout kLayout = tile_layout(QuantType::F32);
  static DECODE F32x16 column(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct F16 {
  static constexpr TileLayout kLayout = tile_layout(QuantType::F16);
  static DECODE F32x16 column(const uint8_t* p) { return from_f16(halves(p)); }
};
struct BF16 {
  static constexpr TileLayout kLayout = tile_layout(QuantType::BF16);
  static DECODE F32x16 column(const uint8_t* p) { return from_bf16(halves(p)); }
};

// Few tokens prefetch as with quantized weights, because memory limits them. More tokens read tiles repeatedly from a
// cache.
template <int R, int T, Prefetch way>
DECODE void prefetch_floats(const uint8_t* tile) {
  if constexpr (T <= kPrefetchedTokens)
    prefetch_behind<way, R>(tile);
  else
    __builtin_prefetch(tile + 2048);
}

// Calls f with the product's kind of prefetching as a constant.
template <typename F>
void with_prefetch(const Product& p, F f) {
  if (p.prefetch == Prefetch::Near)
    f(std::integral_constant<Prefetch, Prefetch::Near>());
  else
    f(std::integral_constant<Prefetch, Prefetch::Far>());
}

// Multiplies R tiles with T tokens, enough independent sums to hide the latency of a multiply-add. Tiles and tokens
// beyond the end repeat the last one, and their results are discarded.
template <class Type, int R, int T, Prefetch way>
void multiply_float_block(const Product& p, int first_tile, int tile_end, int first_token, int tokens) {
  const uint8_t* w[R];
  const float* a[T];
  F32x16 acc[R][T];
  UNROLL for (int r = 0; r < R; r++) {
    const int tile = first_tile + r < tile_end ? first_tile + r : tile_end - 1;
    w[r] = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
  }
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) acc[r][t] = zero();
  for (int k = 0; k < p.segments; k++) {
    F32x16 weights[R];
    UNROLL for (int r = 0; r < R; r++) {
      weights[r] = Type::column(w[r]);
      prefetch_floats<R, T, way>(w[r]);
      w[r] += Type::kLayout.body_bytes;
    }
    UNROLL for (int t = 0; t < T; t++) {
      const F32x16 activation = broadcast(a[t][k]);
      UNROLL for (int r = 0; r < R; r++) acc[r][t] = fma(weights[r], activation, acc[r][t]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < T; t++) if (first_tile + r < tile_end && first_token + t < tokens)
          store_rows(p.output, first_tile + r, first_token + t, acc[r][t]);
}

template <class Type, int R, int T, Prefetch way = Prefetch::Far>
void multiply_in_blocks(const Product& p, int tokens, int tile_begin, int tile_end) {
  for (int tile = tile_begin; tile < tile_end; tile += R)
    for (int t = 0; t < tokens; t += T) multiply_float_block<Type, R, T, way>(p, tile, tile_end, t, tokens);
}

template <class Type>
void multiply_floats(const Product& p, int tokens, int tile_begin, int tile_end) {
  if (tokens > kPrefetchedTokens)
    return multiply_in_blocks<Type, kFloatRows, kFloatTokens>(p, tokens, tile_begin, tile_end);
  with_prefetch(p, [&](auto way) {
    if (tokens == 1) return multiply_in_blocks<Type, 4, 1, way()>(p, tokens, tile_begin, tile_end);
    multiply_in_blocks<Type, (kFloatRows < 2 ? 2 : kFloatRows), 2, way()>(p, tokens, tile_begin, tile_end);
  });
}

template <class Type, int T, Prefetch way = Prefetch::Far>
void multiply_tile(const Product& p, int tile, int first_token, int tokens) {
  const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
  const Activation<Type>* a[T];
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  F32x16 acc[1][T];
  UNROLL for (int t = 0; t < T; t++) acc[0][t] = zero();
  for (int s = 0; s < p.segments; s++) {
    const TileSegment<Type, way> w[1] = {segment_of<Type, way>(weights, s, p.segments)};
    add_segment<Type>(w, a, acc);
    UNROLL for (int t = 0; t < T; t++) a[t]++;
  }
  UNROLL for (int t = 0; t < T; t++)
    if (first_token + t < tokens) store_rows(p.output, tile, first_token + t, acc[0][t]);
}

template <class Type>
constexpr bool kFloat = Type::kLayout.activation == ActivationFormat::F32;

// Maximum number of tokens that are multiplied directly: unlimited for float types, and smaller for types that take
// long to decode.
template <class Type>
constexpr int direct_tokens() {
  if constexpr (kFloat<Type>)
    return INT32_MAX;
  else if constexpr (requires { Type::kDirectTokens; })
    return Type::kDirectTokens;
  else
    return kDirectTokens<Type::kBits>;
}

template <class Type>
void multiply_quantized(const Product& p, int tokens, int tile_begin, int tile_end) {
  for (int tile = tile_begin; tile < tile_end; tile++) {
    int t = 0;
    for (; t + kDirectWidth / 2 < tokens; t += kDirectWidth) multiply_tile<Type, kDirectWidth>(p, tile, t, tokens);
    switch (tokens - t) {
      case 1: with_prefetch(p, [&](auto way) { multiply_tile<Type, 1, way()>(p, tile, t, tokens); }); break;
      case 2: with_prefetch(p, [&](auto way) { multiply_tile<Type, 2, way()>(p, tile, t, tokens); }); break;
      case 3:
      case 4: multiply_tile<Type, 4>(p, tile, t, tokens); break;
      default: break;
    }
  }
}

template <class Type>
void multiply_few(const Product& p, int tokens, int tile_begin, int tile_end) {
  if constexpr (kFloat<Type>)
    multiply_floats<Type>(p, tokens, tile_begin, tile_end);
  else
    multiply_quantized<Type>(p, tokens, tile_begin, tile_end);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
