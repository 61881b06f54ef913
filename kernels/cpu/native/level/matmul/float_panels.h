// Products of float weights with many tokens: some columns of their activations are copied to the second-level cache,
// for some tiles, of which each stays in the first-level cache for all tokens. Between two stretches of columns the
// sums wait in memory, so that each is the same chain of operations as without panels.
#pragma once

#include "level/matmul/panels.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kFloatDirectTokens = 32;
constexpr int kFloatStretch = 256, kFloatPanelTokens = 144, kFloatPanelTiles = 16;  // columns, tokens and tiles at most
constexpr int kFloatSums = kFloatRows * kFloatTokens * kTileRows;
static_assert(kFloatPanelTokens % kFloatTokens == 0 && kFloatPanelTiles % kFloatRows == 0);

// Scratch memory of a thread.
struct FloatPanel {
  float activations[kFloatPanelTokens][kFloatStretch];
  float sums[kFloatPanelTiles * kFloatPanelTokens / (kFloatRows * kFloatTokens)][kFloatSums];
};
static_assert(sizeof(FloatPanel) <= kMatmulScratchBytes);

// kFloatRows tiles times kFloatTokens tokens, added to `sums`. Those past the last are computed, too, and thrown away.
template <class Type>
DECODE void add_float_products(const Product& p, const PanelBlock& part, const float* activations, float* sums) {
  constexpr int R = kFloatRows, T = kFloatTokens;
  const uint8_t* w[R];
  F32x16 acc[R][T];
  UNROLL for (int r = 0; r < R; r++) {
    const int tile = part.tile + r < part.tile_end ? part.tile + r : part.tile_end - 1;
    w[r] = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
    w[r] += static_cast<size_t>(part.segment) * Type::kLayout.body_bytes;
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++)
    acc[r][t] = part.segment == 0 ? zero() : load(sums + kTileRows * (r * T + t));
  for (int k = 0; k < part.segment_end - part.segment; k++) {
    F32x16 weights[R];
    UNROLL for (int r = 0; r < R; r++) {
      weights[r] = Type::column(w[r]);
      w[r] += Type::kLayout.body_bytes;
    }
    __builtin_prefetch(activations + T * (kFloatStretch + k));  // of the next tokens
    UNROLL for (int t = 0; t < T; t++) {
      const F32x16 activation = broadcast(activations[t * kFloatStretch + k]);
      UNROLL for (int r = 0; r < R; r++) acc[r][t] = fma(weights[r], activation, acc[r][t]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int t = 0; t < T; t++) store(sums + kTileRows * (r * T + t), acc[r][t]);
}

[[maybe_unused]] void store_float_sums(const Product& p, const PanelBlock& part, const float* sums) {
  for (int r = 0; r < kFloatRows && part.tile + r < part.tile_end; r++)
    for (int t = 0; t < kFloatTokens && part.token + t < part.token_end; t++)
      store_rows(p.output, part.tile + r, part.token + t, load(sums + kTileRows * (r * kFloatTokens + t)));
}

// All of k for the tiles and tokens of a block.
template <class Type>
void multiply_by_float_panel(const Product& p, const PanelBlock& block, FloatPanel& panel) {
  const int stretches = parts_of(p.segments, kFloatStretch);
  PanelBlock part = block;
  for (int i = 0; i < stretches; i++) {
    part.segment = part_begin(p.segments, i, stretches);
    part.segment_end = part_begin(p.segments, i + 1, stretches);
    const size_t bytes = static_cast<size_t>(part.segment_end - part.segment) * sizeof(float);
    for (int t = 0; t < parts_of(block.token_end - block.token, kFloatTokens) * kFloatTokens; t++)
      memcpy(panel.activations[t], token_activations<Type>(p, block.token + t, block.token_end) + part.segment, bytes);
    float* sums = panel.sums[0];
    for (part.tile = block.tile; part.tile < block.tile_end; part.tile += kFloatRows)
      for (part.token = block.token; part.token < block.token_end; part.token += kFloatTokens, sums += kFloatSums) {
        add_float_products<Type>(p, part, panel.activations[part.token - block.token], sums);
        if (i + 1 == stretches) store_float_sums(p, part, sums);
      }
  }
}

template <class Type>
void multiply_by_float_panels(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch) {
  const int groups = parts_of(tokens, kFloatTokens), times = parts_of(tokens, kFloatPanelTokens);
  for (int i = 0; i < times; i++) {
    const int token = part_begin(groups, i, times) * kFloatTokens;
    const int end = part_begin(groups, i + 1, times) * kFloatTokens;
    for (int tile = tile_begin; tile < tile_end; tile += kFloatPanelTiles) {
      const int last_tile = tile + kFloatPanelTiles < tile_end ? tile + kFloatPanelTiles : tile_end;
      const PanelBlock block{tile, last_tile, token, end < tokens ? end : tokens, 0, 0};
      multiply_by_float_panel<Type>(p, block, *reinterpret_cast<FloatPanel*>(scratch));
    }
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
