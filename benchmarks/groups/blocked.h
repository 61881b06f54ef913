// The product's loops of few and of many tokens, with sums over k in blocks that a binary tree joins. `Blocked` is a product
// with the borders of its blocks in segments: block b is [borders[b], borders[b + 1]), and the number of blocks is a
// power of two. Inside a block, operations and their order are those of the product.
#pragma once

#include "level/matmul/products.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kMostBlocks = 16, kMostLevels = 5;

struct Blocked {
  Product product;
  int blocks;
  int borders[kMostBlocks + 1];
};

// The sums of blocks, until all are there.
template <int R, int T>
struct Ends {
  float values[kMostBlocks][R * T * kTileRows];

  DECODE void keep(int block, const F32x16 (&acc)[R][T]) {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) store(values[block] + kTileRows * (r * T + t), acc[r][t]);
  }

  DECODE F32x16 two(int first, int i) const { return add(load(values[first] + i), load(values[first + 1] + i)); }
  DECODE F32x16 four(int first, int i) const { return add(two(first, i), two(first + 2, i)); }
  DECODE F32x16 eight(int first, int i) const { return add(four(first, i), four(first + 4, i)); }

  // The tree's sum of the first `blocks`, a power of two.
  DECODE void join(int blocks, F32x16 (&acc)[R][T]) const {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) {
      const int i = kTileRows * (r * T + t);
      switch (blocks) {
        case 1: acc[r][t] = load(values[0] + i); break;
        case 2: acc[r][t] = two(0, i); break;
        case 4: acc[r][t] = four(0, i); break;
        case 8: acc[r][t] = eight(0, i); break;
        default: acc[r][t] = add(eight(0, i), eight(8, i));
      }
    }
  }
};

template <class Type, int R, int T, Prefetch way>
void blocked_floats(const Blocked& blocked, int first_tile, int tile_end, int first_token, int tokens) {
  const Product& p = blocked.product;
  const uint8_t* w[R];
  const float* a[T];
  F32x16 acc[R][T];
  Ends<R, T> ends;
  UNROLL for (int r = 0; r < R; r++)
    w[r] = p.tiles + static_cast<size_t>(first_tile + r < tile_end ? first_tile + r : tile_end - 1) * p.tile_bytes;
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  for (int b = 0; b < blocked.blocks; b++) {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) acc[r][t] = zero();
    for (int k = blocked.borders[b]; k < blocked.borders[b + 1]; k++) {
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
    ends.keep(b, acc);
  }
  ends.join(blocked.blocks, acc);
  UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int t = 0; t < T; t++) if (first_tile + r < tile_end && first_token + t < tokens)
          store_rows(p.output, first_tile + r, first_token + t, acc[r][t]);
}

template <class Type, int R, int T, Prefetch way = Prefetch::Far>
void blocked_in_floats(const Blocked& blocked, int tokens, int tile_begin, int tile_end) {
  for (int tile = tile_begin; tile < tile_end; tile += R)
    for (int t = 0; t < tokens; t += T) blocked_floats<Type, R, T, way>(blocked, tile, tile_end, t, tokens);
}

template <class Type, int T, Prefetch way = Prefetch::Far>
void blocked_tile(const Blocked& blocked, int tile, int first_token, int tokens) {
  const Product& p = blocked.product;
  const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
  const Activation<Type>* a[T];
  F32x16 acc[1][T];
  Ends<1, T> ends;
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  for (int b = 0; b < blocked.blocks; b++) {
    UNROLL for (int t = 0; t < T; t++) acc[0][t] = zero();
    for (int s = blocked.borders[b]; s < blocked.borders[b + 1]; s++) {
      const TileSegment<Type, way> w[1] = {segment_of<Type, way>(weights, s, p.segments)};
      add_segment<Type>(w, a, acc);
      UNROLL for (int t = 0; t < T; t++) a[t]++;
    }
    ends.keep(b, acc);
  }
  ends.join(blocked.blocks, acc);
  UNROLL for (int t = 0; t < T; t++)
    if (first_token + t < tokens) store_rows(p.output, tile, first_token + t, acc[0][t]);
}

template <class Type>
void blocked_few(const Blocked& blocked, int tokens, int tile_begin, int tile_end) {
  if constexpr (kFloat<Type>) {
    if (tokens > kPrefetchedTokens) return blocked_in_floats<Type, kFloatRows, kFloatTokens>(blocked, tokens, tile_begin, tile_end);
    with_prefetch(blocked.product, [&](auto way) {
      if (tokens == 1) return blocked_in_floats<Type, 4, 1, way()>(blocked, tokens, tile_begin, tile_end);
      blocked_in_floats<Type, (kFloatRows < 2 ? 2 : kFloatRows), 2, way()>(blocked, tokens, tile_begin, tile_end);
    });
  } else {
    for (int tile = tile_begin; tile < tile_end; tile++) {
      int t = 0;
      for (; t + kDirectWidth / 2 < tokens; t += kDirectWidth) blocked_tile<Type, kDirectWidth>(blocked, tile, t, tokens);
      if (tokens - t == 1) with_prefetch(blocked.product, [&](auto way) { blocked_tile<Type, 1, way()>(blocked, tile, t, tokens); });
      if (tokens - t == 2) with_prefetch(blocked.product, [&](auto way) { blocked_tile<Type, 2, way()>(blocked, tile, t, tokens); });
      if (tokens - t > 2) blocked_tile<Type, 4>(blocked, tile, t, tokens);
    }
  }
}

// What a panel holds at a time: aligned blocks, as many as are a subtree, or a part of one block.
struct Stretch {
  int segment, segment_end;
  int first_block, blocks;
  int level;      // of the subtree
  bool is_first;  // of the parts of a block
  bool is_last;
};

template <class Type>
int stretches_of(const Blocked& blocked, Stretch (&out)[64]) {
  const auto fits = [&](int group) {
    for (int b = 0; b < blocked.blocks; b += group)
      if (blocked.borders[b + group] - blocked.borders[b] > kPanelSegments<Type>) return false;
    return true;
  };
  int group = 1, level = 0, count = 0;
  while (2 * group <= blocked.blocks && fits(2 * group)) group *= 2, level++;
  for (int b = 0; b < blocked.blocks; b += group) {
    const int begin = blocked.borders[b], all = blocked.borders[b + group] - begin;
    const int parts = group > 1 ? 1 : std::max(1, parts_of(all, kPanelSegments<Type>));
    for (int i = 0; i < parts; i++)
      out[count++] = {begin + part_begin(all, i, parts), begin + part_begin(all, i + 1, parts), b, group, level, i == 0, i + 1 == parts};
  }
  return count;
}

constexpr int kSlot = kTileRows * kPanelTiles * (kPanelMostTokens + kPanelMorePlaces);
constexpr size_t kBlockedScratchBytes = kPanelTiles * kPanelTileBytes + (kMostLevels + 1) * kSlot * sizeof(float);

// As add_products of the product. `chain` is the place of a sum that a later stretch continues, followed by one a level.
template <class Type>
DECODE void blocked_products(const Blocked& blocked, const Stretch& stretch, const PanelBlock& part,
                             const PanelSegment<Type>* panel, float* chain) {
  constexpr int R = kBlockTiles, T = kBlockTokens;
  const Activation<Type>* a[T];
  PanelView<Type> w[R];
  F32x16 acc[R][T];
  Ends<R, T> ends;
  UNROLL for (int t = 0; t < T; t++)
    a[t] = token_activations<Type>(blocked.product, part.token + t, part.token_end) + stretch.segment;
  UNROLL for (int r = 0; r < R; r++) w[r].segment = panel + r * kPanelSegments<Type>;
  for (int b = 0; b < stretch.blocks; b++) {
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++)
      acc[r][t] = stretch.is_first ? zero() : load(chain + kTileRows * (r * T + t));
    const int* borders = blocked.borders + stretch.first_block + b;
    add_segments<Type>(stretch.blocks == 1 ? stretch.segment_end - stretch.segment : borders[1] - borders[0], w, a, acc);
    ends.keep(b, acc);
  }
  ends.join(stretch.blocks, acc);
  float* place = chain;
  if (stretch.is_last) {
    int level = stretch.level;
    for (; stretch.first_block >> level & 1; level++)
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++)
        acc[r][t] = add(load(chain + (level + 1) * kSlot + kTileRows * (r * T + t)), acc[r][t]);
    if (stretch.first_block + stretch.blocks < blocked.blocks) place = chain + (level + 1) * kSlot;
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int t = 0; t < T; t++) store(place + kTileRows * (r * T + t), acc[r][t]);
}

template <class Type>
void blocked_panel(const Blocked& blocked, PanelBlock block, uint8_t* scratch) {
  const Product& p = blocked.product;
  auto* const panel = reinterpret_cast<PanelSegment<Type>*>(scratch);
  auto* const places = reinterpret_cast<float*>(scratch + kPanelTiles * kPanelTileBytes);
  Stretch stretches[64];
  const int count = stretches_of<Type>(blocked, stretches);
  for (int i = 0; i < count; i++) {
    const Stretch& stretch = stretches[i];
    for (int tile = block.tile; tile < block.tile_end; tile++) {
      const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
      PanelSegment<Type>* out = panel + (tile - block.tile) * kPanelSegments<Type>;
      for (int s = stretch.segment; s < stretch.segment_end; s++) new (out++) PanelSegment<Type>(segment_of<Type>(weights, s, p.segments));
    }
    const int step = count == 1 ? 0 : kTileRows * kBlockTiles * kBlockTokens;
    float* chain = places;
    PanelBlock part = block;
    for (; part.token < block.token_end; part.token += kBlockTokens)
      for (part.tile = block.tile; part.tile < block.tile_end; part.tile += kBlockTiles, chain += step) {
        blocked_products<Type>(blocked, stretch, part, panel + (part.tile - block.tile) * kPanelSegments<Type>, chain);
        if (i + 1 == count) store_sums(p, part, chain);
      }
  }
}

template <class Type>
void blocked_many(const Blocked& blocked, int tokens, int tile_begin, int tile_end, uint8_t* scratch) {
  const int times = parts_of(tokens, kPanelMostTokens);
  for (int tile = tile_begin; tile < tile_end; tile += kPanelTiles)
    for (int i = 0; i < times; i++)
      blocked_panel<Type>(blocked, {tile, std::min(tile + kPanelTiles, tile_end), part_begin(tokens, i, times), part_begin(tokens, i + 1, times), 0, 0}, scratch);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
