// The loops of products. With quantized weights few tokens straight from the tiles, which are then read at the speed of
// memory; many by panels: a few tiles are decoded once, into scratch memory that stays in the cache, for all of them.
#pragma once

#include "level/matmul/segment.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Float weights: one fused multiply-add per weight, in k order.
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

// R tiles times T tokens: as many independent sums as hide the latency of a multiply-add. Tiles and tokens past the
// last are computed like it and thrown away.
template <class Type, int R, int T>
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
      __builtin_prefetch(w[r] + 2048);
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

template <class Type, int R, int T>
void multiply_in_blocks(const Product& p, int tokens, int tile_begin, int tile_end) {
  for (int tile = tile_begin; tile < tile_end; tile += R)
    for (int t = 0; t < tokens; t += T) multiply_float_block<Type, R, T>(p, tile, tile_end, t, tokens);
}

template <class Type>
void multiply_floats(const Product& p, int tokens, int tile_begin, int tile_end) {
  if (tokens == 1) return multiply_in_blocks<Type, 4, 1>(p, tokens, tile_begin, tile_end);
  if (tokens == 2) return multiply_in_blocks < Type, kFloatRows<2 ? 2 : kFloatRows, 2>(p, tokens, tile_begin, tile_end);
  multiply_in_blocks<Type, kFloatRows, kFloatTokens>(p, tokens, tile_begin, tile_end);
}

template <class Type, bool has = Type::kHasMin>
struct SegmentMin {};
template <class Type>
struct SegmentMin<Type, true> {
  F32x16 value;
};

// A decoded segment; the operations on it are those of TileSegment.
template <class Type>
struct PanelSegment {
  Bytes groups[Type::kSubBlocks * kGroups<Type>];
  F32x16 scale_;
  [[no_unique_address]] SegmentMin<Type> min_;
  [[no_unique_address]] SubScales<Type> sub_scales;
  [[no_unique_address]] SubMins<Type> sub_mins;

  DECODE explicit PanelSegment(const TileSegment<Type>& w) : sub_scales(w.sub_scales), sub_mins(w.sub_mins) {
#pragma GCC unroll 1
    for (int first = 0; first < Type::kSubBlocks; first += kTogether<Type>)
      UNROLL for (int j = first; j < first + kTogether<Type>; j++) {
        w.prefetch(j);
        UNROLL for (int g = 0; g < kGroups<Type>; g++) groups[j * kGroups<Type> + g] = w.group(j, g);
      }
    scale_ = w.scale();
    if constexpr (Type::kHasMin) min_.value = w.min();
  }
};

// What a product sees of it.
template <class Type>
struct PanelView {
  const PanelSegment<Type>* segment;
  DECODE Bytes group(int j, int g) const { return segment->groups[j * kGroups<Type> + g]; }
  DECODE Scale sub_scale(int j) const { return segment->sub_scales.scales[j]; }
  DECODE Bytes mins(int i) const { return segment->sub_mins.mins[i]; }
  DECODE F32x16 scale() const { return segment->scale_; }
  DECODE F32x16 min() const { return segment->min_.value; }
  DECODE void prefetch(int) const {}
};

template <class Type>
DECODE void unpack_tile(const Product& p, int tile, PanelSegment<Type>* out) {
  const uint8_t* weights = p.tiles + static_cast<size_t>(tile) * p.tile_bytes;
  for (int s = 0; s < p.segments; s++) out[s] = PanelSegment<Type>(segment_of<Type>(weights, s, p.segments));
}

static_assert(kPanelTiles % kPanelRows == 0);

// kPanelRows tiles of the panel times kPanelTokens tokens. Tiles and tokens past the last are computed from whatever is
// there and thrown away.
template <class Type>
void multiply_panel(const Product& p, const PanelSegment<Type>* panel, int first_tile, int tile_end, int first_token,
                    int tokens) {
  constexpr int R = kPanelRows, T = kPanelTokens;
  const Activation<Type>* a[T];
  PanelView<Type> w[R];
  F32x16 acc[R][T];
  UNROLL for (int t = 0; t < T; t++) a[t] = token_activations<Type>(p, first_token + t, tokens);
  UNROLL for (int r = 0; r < R; r++) w[r].segment = panel + r * p.segments;
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) acc[r][t] = zero();
  for (int s = 0; s < p.segments; s++) {
    add_segment<Type>(w, a, acc);
    UNROLL for (int t = 0; t < T; t++) a[t]++;
    UNROLL for (int r = 0; r < R; r++) w[r].segment++;
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++)
    if (first_tile + r < tile_end && first_token + t < tokens)
      store_rows(p.output, first_tile + r, first_token + t, acc[r][t]);
}

template <class Type>
void multiply_by_panels(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch) {
  static_assert(sizeof(PanelSegment<Type>) <= static_cast<size_t>(kPanelColumnBytes) * Type::kLayout.segment_cols);
  auto* panel = reinterpret_cast<PanelSegment<Type>*>(scratch);
  for (int first = tile_begin; first < tile_end; first += kPanelTiles) {
    const int end = first + kPanelTiles < tile_end ? first + kPanelTiles : tile_end;
    for (int tile = first; tile < end; tile++) unpack_tile<Type>(p, tile, panel + (tile - first) * p.segments);
    for (int t = 0; t < tokens; t += kPanelTokens)
      for (int tile = first; tile < end; tile += kPanelRows)
        multiply_panel<Type>(p, panel + (tile - first) * p.segments, tile, end, t, tokens);
  }
}

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
