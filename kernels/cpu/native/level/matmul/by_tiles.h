// The panel loop with AMX tile registers, sixteen rows times sixteen tokens. The k-groups of a sub-block already have
// the layout of a tile. Sums of sub-blocks go through memory to vectors, which multiply them with the scales.
#pragma once

#include <utility>

#include "level/matmul/panel_segment.h"
#include "simd/amx/tiles.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kBlockTiles = 1, kBlockTokens = 16;

struct PanelForm : AsDecoded {
  static constexpr bool kSigned = true;
};

template <class Type>
using PanelScope = TileShapes<kGroups<Type>>;

// Number of segments per step, so that several sums are in flight.
template <class Type>
constexpr int kSegmentsTogether = Type::kSubBlocks == 1 ? 4 : 1;

// The quants of a block's tokens, at equal distances in bytes.
struct TokenRows {
  const int8_t* q;
  int64_t token_stride, segment_stride;
};

// Uses the activations in place.
template <class Type>
DECODE TokenRows rows_in_place(const Activation<Type>* const (&a)[kBlockTokens]) {
  const int64_t stride = reinterpret_cast<const int8_t*>(a[1]) - reinterpret_cast<const int8_t*>(a[0]);
  return {a[0]->q, stride, sizeof(Activation<Type>)};
}

template <class Type>
DECODE bool at_equal_distances(const Activation<Type>* const (&a)[kBlockTokens]) {
  const int64_t stride = rows_in_place<Type>(a).token_stride;
  bool equal = true;
  for (int t = 2; t < kBlockTokens; t++)
    equal &= reinterpret_cast<const int8_t*>(a[t]) - reinterpret_cast<const int8_t*>(a[t - 1]) == stride;
  return equal;
}

// Copies the activations of tokens that are not at equal distances.
template <class Type, int segments>
struct RowCopies {
  static constexpr int kCols = Type::kLayout.segment_cols;
  alignas(64) int8_t q[kBlockTokens][segments * kCols];

  DECODE TokenRows copy(const Activation<Type>* const (&a)[kBlockTokens]) {
    for (int t = 0; t < kBlockTokens; t++)
      for (int s = 0; s < segments; s++) memcpy(q[t] + s * kCols, a[t][s].q, kCols);
    return {q[0], segments * kCols, kCols};
  }
};

using BlockSums = int32_t[kBlockTokens][kTileRows];

// Uses tile registers 0 to 3 for sums, 4 and 5 for activations, and 6 and 7 for weights.
template <class Type, int n>
DECODE void sum_sub_block(const DecodedSegment<Type, PanelForm>* segments, const TokenRows& rows, BlockSums& out) {
  constexpr int groups = kGroups<Type>, s = n / Type::kSubBlocks, j = n % Type::kSubBlocks;
  constexpr int sums = n % 4, tokens = 4 + n % 2, weights = 6 + n % 2;
  tile_zero<sums>();
  tile_load<tokens>(rows.q + s * rows.segment_stride + 4 * groups * j, rows.token_stride);
  tile_load<weights>(segments[s].groups + groups * j, sizeof(Bytes));
  tile_dot<sums, tokens, weights>();
  tile_store<sums>(out, sizeof out[0]);
}

template <class Type, int... n>
DECODE void sum_sub_blocks(const DecodedSegment<Type, PanelForm>* segments, const TokenRows& rows, BlockSums* out,
                           std::integer_sequence<int, n...>) {
  (sum_sub_block<Type, n>(segments, rows, out[n]), ...);
}

DECODE I32x16 lanes_of(const int32_t (&row)[kTileRows]) {
  return as_lanes(load_bytes(reinterpret_cast<const uint8_t*>(row)));
}

// Returns the sum of a segment for one token, from the sums of its sub-blocks.
template <class Type, class View>
DECODE I32x16 token_sum(const View& w, const BlockSums* sums, int t) {
  I32x16 total = broadcast(0);
  UNROLL for (int j = 0; j < Type::kSubBlocks; j++) {
    if constexpr (kSubScaled<Type>)
      total = add(total, mul(lanes_of(sums[j][t]), scale_lanes(w.sub_scale(j))));
    else
      total = add(total, lanes_of(sums[j][t]));
  }
  return total;
}

template <class Type, int segments, class View>
DECODE void add_together(const View& w, const TokenRows& rows, const Activation<Type>* const (&a)[kBlockTokens],
                         F32x16 (&acc)[1][kBlockTokens]) {
  alignas(64) BlockSums sums[segments * Type::kSubBlocks];
  sum_sub_blocks<Type>(w.segment, rows, sums, std::make_integer_sequence<int, segments * Type::kSubBlocks>());
#pragma GCC unroll 1
  for (int t = 0; t < kBlockTokens; t++) {
    F32x16 out[1][1] = {{acc[0][t]}};
    UNROLL for (int s = 0; s < segments; s++) {
      const View of[1] = {{w.segment + s}};
      const Activation<Type>* const token[1] = {a[t] + s};
      I32x16 total[1][1] = {{token_sum<Type>(of[0], sums + s * Type::kSubBlocks, t)}};
      add_total<Type>(of, token, total, out);
    }
    acc[0][t] = out[0][0];
  }
}

template <class Type, int segments, class View>
void add_next(bool in_place, View& w, const Activation<Type>* (&a)[kBlockTokens], F32x16 (&acc)[1][kBlockTokens]) {
  if (in_place) {
    add_together<Type, segments>(w, rows_in_place<Type>(a), a, acc);
  } else {
    RowCopies<Type, segments> copies;
    add_together<Type, segments>(w, copies.copy(a), a, acc);
  }
  for (const Activation<Type>*& token : a) token += segments;
  w.segment += segments;
}

template <class Type, class View>
DECODE void add_segments(int count, View (&w)[1], const Activation<Type>* (&a)[kBlockTokens],
                         F32x16 (&acc)[1][kBlockTokens]) {
  constexpr int together = kSegmentsTogether<Type>;
  const bool in_place = at_equal_distances<Type>(a);
  int s = 0;
  for (; s + together <= count; s += together) add_next<Type, together>(in_place, w[0], a, acc);
  if constexpr (together > 1)
    for (; s < count; s++) add_next<Type, 1>(in_place, w[0], a, acc);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
