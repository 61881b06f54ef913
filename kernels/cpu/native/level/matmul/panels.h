// Products of quantized weights with many tokens: a few tiles are decoded once for all of them, a stretch of k at a time,
// into a panel that stays in the second-level cache. In between, the sums wait in memory, so that each of them is the same
// chain of operations as without panels.
#pragma once

#include <new>

// A block of tiles and tokens is multiplied by the loop of the level.
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

// Of a tile in a panel.
template <class Type>
constexpr int kPanelSegments = static_cast<int>(kPanelTileBytes / sizeof(PanelSegment<Type>));

static_assert(kPanelTiles % kBlockTiles == 0);
static_assert(kPanelMostTokens % kBlockTokens == 0 || kBlockTokens <= kPanelMorePlaces);

// What is computed at a time: tiles, tokens and segments from the first to before the end.
struct PanelBlock {
  int tile, tile_end, token, token_end, segment, segment_end;
};

// kBlockTiles tiles of the panel times kBlockTokens tokens, added to `sums`. Tiles and tokens past the last are computed
// from whatever is there and thrown away. (Results are stored elsewhere: around a call, compilers would keep the sums out
// of registers.)
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

// One stretch of k for all tiles of the panel, each token's activations once. Sums of all of k need no places of their own.
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

// How many nearly equal parts of at most `most` there are of `all`, and where part i begins.
DECODE int parts_of(int all, int most) { return (all + most - 1) / most; }
DECODE int part_begin(int all, int i, int parts) { return static_cast<int>(int64_t{all} * i / parts); }

// All of k.
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
