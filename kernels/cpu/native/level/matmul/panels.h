// Products of quantized weights with many tokens. A stretch of k of a few tiles is decoded once for all tokens, into a
// panel that stays in the L2 cache. Between stretches the sums are kept in memory, so each sum is the same chain of
// operations as without panels.
#pragma once

#include <new>

// The loop of the level multiplies a block of tiles and tokens.
#if defined(LLAMACLUST_TILES)
#include "level/matmul/by_tiles.h"
#elif defined(LLAMACLUST_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "level/matmul/by_row_pairs.h"
#else
#include "level/matmul/by_groups.h"
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <class Type>
using PanelSegment = DecodedSegment<Type, PanelForm>;
template <class Type>
using PanelView = DecodedView<Type, PanelForm>;

// Number of segments of a tile in a panel.
template <class Type>
constexpr int kPanelSegments = static_cast<int>(kPanelTileBytes / sizeof(PanelSegment<Type>));

static_assert(kPanelTiles % kBlockTiles == 0);
static_assert(kPanelMostTokens % kBlockTokens == 0 || kBlockTokens <= kPanelMorePlaces);

// Half-open ranges of tiles, tokens and segments.
struct PanelBlock {
  int tile, tile_end, token, token_end, segment, segment_end;
};

// Multiplies kBlockTiles tiles of the panel with kBlockTokens tokens, and adds the products to `sums`. Tiles and tokens
// beyond the end are computed from arbitrary data and discarded. (Another function stores the results, because a call
// would keep compilers from holding the sums in registers.)
template <class Type>
DECODE void add_products(const Product& p, const PanelBlock& part, const PanelSegment<Type>* panel, float* sums) {
  constexpr int R = kBlockTiles, T = kBlockTokens;
  const Activation<Type>* a[T];
  PanelView<Type> w[R];
  F32x16 acc[R][T];
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, part.token + t, part.token_end) + part.segment;
  UNROLL for (int r = 0; r < R; r++) w[r].segment = panel + r * kPanelSegments<Type>;
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++)
    acc[r][t] = part.segment == 0 ? zero() : load(sums + kTileRows * (r * T + t));
  add_segments<Type>(part.segment_end - part.segment, w, a, acc);
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int t = 0; t < T; t++) store(sums + kTileRows * (r * T + t), acc[r][t]);
}

[[maybe_unused]] void store_sums(const Product& p, const PanelBlock& part, const float* sums) {
  for (int r = 0; r < kBlockTiles && part.tile + r < part.tile_end; r++)
    for (int t = 0; t < kBlockTokens && part.token + t < part.token_end; t++)
      store_rows(p.output, part.tile + r, part.token + t, load(sums + kTileRows * (r * kBlockTokens + t)));
}

// Multiplies one stretch of k of all tiles of the panel. If the stretch is all of k, all blocks share one place for
// sums.
template <class Type>
void multiply_panel(const Product& p, const PanelBlock& block, const PanelSegment<Type>* panel, float* sums) {
  const bool last = block.segment_end == p.segments;
  const int step = block.segment == 0 && last ? 0 : kTileRows * kBlockTiles * kBlockTokens;
  PanelBlock part = block;
  for (; part.token < block.token_end; part.token += kBlockTokens)
    for (part.tile = block.tile; part.tile < block.tile_end; part.tile += kBlockTiles, sums += step) {
      add_products<Type>(p, part, panel + (part.tile - block.tile) * kPanelSegments<Type>, sums);
      if (last) store_sums(p, part, sums);
    }
}

// parts_of divides `all` into nearly equal parts of at most `most` and returns their number; part_begin returns the
// start of part i.
DECODE int parts_of(int all, int most) { return (all + most - 1) / most; }
DECODE int part_begin(int all, int i, int parts) { return static_cast<int>(int64_t{all} * i / parts); }

// Multiplies all of k.
template <class Type>
void multiply_by_panel(const Product& p, PanelBlock block, uint8_t* scratch) {
  auto* const panel = reinterpret_cast<PanelSegment<Type>*>(scratch);
  auto* const sums = reinterpret_cast<float*>(scratch + kPanelTiles * kPanelTileBytes);
  const int stretches = parts_of(p.segments, kPanelSegments<Type>);
  for (int i = 0; i < stretches; i++) {
    block.segment = part_begin(p.segments, i, stretches);
    block.segment_end = part_begin(p.segments, i + 1, stretches);
    for (int tile = block.tile; tile < block.tile_end; tile++) {
      const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
      PanelSegment<Type>* out = panel + (tile - block.tile) * kPanelSegments<Type>;
      for (int s = block.segment; s < block.segment_end; s++) new (out++) PanelSegment<Type>(segment_of<Type>(weights, s, p.segments));
    }
    multiply_panel<Type>(p, block, panel, sums);
  }
}

template <class Type>
void multiply_by_panels(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch) {
  [[maybe_unused]] const PanelScope<Type> scope;
  const int times = parts_of(tokens, kPanelMostTokens);
  for (int tile = tile_begin; tile < tile_end; tile += kPanelTiles) {
    const int end = tile + kPanelTiles < tile_end ? tile + kPanelTiles : tile_end;
    for (int i = 0; i < times; i++) {
      const int token = part_begin(tokens, i, times), token_end = part_begin(tokens, i + 1, times);
      multiply_by_panel<Type>(p, {tile, end, token, token_end, 0, 0}, scratch);
    }
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
