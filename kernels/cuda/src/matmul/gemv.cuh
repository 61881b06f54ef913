// Products of up to eight rows: a block goes through tiles of sixteen rows of weights, its warps take pieces of them in
// turn. All eight rows cost what one does, since a matrix unit takes eight; GPUs without one have a shorter way for one row.
//
// Bound by memory: each weight is read once, and from 8.0 on pieces are requested ahead, also of the next tile, so that
// every warp has one or two under way at any time; older GPUs have other warps meanwhile. Where memory is fastest, issuing
// instructions comes next. Activations come from the first cache: all blocks of a multiprocessor read the same. What a
// piece adds to outputs is in registers, two floats a segment and output (four with mins), until the warp before is done
// with the piece before: totals pass from warp to warp, so that all segments are added in k order while other warps
// multiply.
#pragma once

#include "pieces.cuh"

namespace llamaclust::cuda {
namespace {

// Blocks on a multiprocessor, each of 128 threads with 96 registers; GPUs without matrix units need 128.
#if LLAMACLUST_ARCH < 750
inline constexpr int kGemvBlocks = 4;
#else
inline constexpr int kGemvBlocks = 5;
#endif

// What a segment adds: total = fma(factor, sum, total), and for types with a min another one.
struct Term {
  float factor, sum;
};
// Of a lane's outputs, which are those of d in mma.cuh: n / 2 says which row of weights, n % 2 which row of activations.
template <class Type>
using Terms = Term[4][Type::kHasMin ? 2 : 1];

// Where a lane finds its activations: those it multiplies (row lane / 4), and the scales of its results (rows 2 c, 2 c
// + 1).
template <class Type>
struct LaneActivations {
  const Activations<Type>* all;
  int first, first_of[2];  // of the groups' segments
  int quants, scales[2];   // inside a segment
  bool one;                // row, whose results count alone
  DEVICE LaneActivations(const Products& p, const Share& share, int segments, int lane)
      : all(reinterpret_cast<const Activations<Type>*>(p.activations)) {
    const int row = activation_row(p, share, lane / 4);
    one = share.n == 1;
    first = row / 8 * segments;
    quants = 4 * (row % 8) + lane % 4;
    UNROLL for (int i = 0; i < 2; i++) {
      const int scale_row = activation_row(p, share, 2 * (lane % 4) + i);
      first_of[i] = scale_row / 8 * segments;
      scales[i] = scale_row % 8;
    }
  }
  DEVICE const Activations<Type>& segment(int s) const { return all[first + s]; }
  DEVICE float scale(int i, int s) const { return all[first_of[i] + s].scale[scales[i]]; }
};

template <class Type>
DEVICE void segment_terms(const Segment& w, const LaneActivations<Type>& a, int s, int lane, Terms<Type>& terms)
  requires(!kWide<Type>)
{
  int32_t weights[4], sums[4] = {kFloatBegin, kFloatBegin, kFloatBegin, kFloatBegin};
  load_weights<Type>(w.body, 0, lane, weights);
  const uint2 q = a.segment(s).q[a.quants];
  const RowPair rows = row_scales<Type>(w.tail, lane);
  multiply_k32(sums, weights, {static_cast<int32_t>(q.x), static_cast<int32_t>(q.y)}, a.one);
  UNROLL for (int n = 0; n < 4; n++) {
    terms[n][0] = {mul(rows.scale[n / 2], a.scale(n % 2, s)), sum_as_float(sums[n])};
    if constexpr (Type::kHasMin)
      terms[n][1] = {rows.min[n / 2], a.all[a.first_of[n % 2] + s].scaled_sum[a.scales[n % 2]]};
  }
}

// Scales of block i of a segment. Lines are read once for all blocks and taken apart for each: so they take few registers.
template <class Type>
DEVICE void scales_of(const Lines (&rows)[2], int i, Scale (&scales)[2][2]) {
  if constexpr (kSubScaled<Type>) UNROLL for (int r = 0; r < 2; r++) {
    Scale all[Type::kSubBlocks];
    Type::sub_scales(rows[r], all);
    scales[r][0] = all[kOf16<Type> ? 2 * i : i];
    scales[r][1] = kOf16<Type> ? all[2 * i + 1] : 0;
  }
}

template <class Type>
DEVICE void segment_terms(const Segment& w, const LaneActivations<Type>& a, int s, int lane, Terms<Type>& terms)
  requires(kWide<Type>)
{
  const Activations256& quants = a.segment(s);
  const Lines rows[2] = {{w.body, lane / 4}, {w.body, lane / 4 + 8}};
  int32_t total[4] = {0, 0, 0, 0};
  UNROLL for (int i = 0; i < 8; i++) {
    int32_t weights[4];
    Scale scales[2][2];
    load_weights<Type>(w.body, i, lane, weights);
    scales_of<Type>(rows, i, scales);
    add_products<Type>(weights, quants.q[i][a.quants], scales, total, a.one);
  }
  int32_t minus[4] = {0, 0, 0, 0};
  if constexpr (Type::kHasMin) {
    const int32_t mins[2] = {mins_of<Type>(rows[0], lane % 4), mins_of<Type>(rows[1], lane % 4)};
    minus_mins(mins, quants.high[a.quants], quants.low[a.quants], minus, a.one);
  }
  const RowPair pair = row_scales<Type>(w.tail, lane);
  UNROLL for (int n = 0; n < 4; n++) {
    const float scale = a.scale(n % 2, s);
    terms[n][0] = {mul(pair.scale[n / 2], scale), __int2float_rn(total[n])};
    if constexpr (Type::kHasMin) terms[n][1] = {mul(pair.min[n / 2], scale), __int2float_rn(minus[n])};
  }
}

// The terms of segments first, first + 1, ... of which `left` are left. Whole: kTogether or more are, so that they have one
// address and distances from it; else each has its own, which costs as much as its arithmetic.
template <class Type, bool whole>
DEVICE void piece_terms(const uint8_t* piece, int first, int left, const LaneActivations<Type>& a, int lane,
                        Terms<Type> (&terms)[kTogether<Type>]) {
  UNROLL for (int i = 0; i < kTogether<Type>; i++) {
    const int at = whole || i < left ? i : left - 1;
    segment_terms<Type>(segment_of<Type>(piece, at, whole ? kTogether<Type> : left), a, first + at, lane, terms[i]);
  }
}

template <class Type>
DEVICE void add_terms(const Terms<Type>& terms, float (&totals)[4]) {
  UNROLL for (const auto& of_output : terms) UNROLL for (const Term& term : of_output) {
    float& total = totals[&of_output - terms];
    total = fma(term.factor, term.sum, total);
  }
}

// Turns go from warp to warp by a named barrier for each, on which it waits and the one before arrives.
inline constexpr int kTurnThreads = 2 * kWarp;
static_assert(kGemvWarps == 4);
DEVICE void wait_for_turn(int warp) {
  switch (warp) {
    case 0: return barrier_wait<0, kTurnThreads>();
    case 1: return barrier_wait<1, kTurnThreads>();
    case 2: return barrier_wait<2, kTurnThreads>();
    default: return barrier_wait<3, kTurnThreads>();
  }
}
DEVICE void give_turn_after(int warp) {
  switch (warp) {
    case 0: return barrier_arrive<1, kTurnThreads>();
    case 1: return barrier_arrive<2, kTurnThreads>();
    case 2: return barrier_arrive<3, kTurnThreads>();
    default: return barrier_arrive<0, kTurnThreads>();
  }
}

template <class Type>
DEVICE void store_tile(const Products& all, const Share& share, int tile, int lane, const float (&totals)[4]) {
  const Product p = product_of(all, 1, tile);
  const Matrix result = result_of(p, share);
  UNROLL for (int n = 0; n < 4; n++) {
    const int row = 2 * (lane % 4) + n % 2;
    if (row < share.n)
      store_result(result, p.bias_rows, out_row(p, share, row), 16 * p.block + lane / 4 + 8 * (n / 2), totals[n]);
  }
}

// Grid: (groups of eight rows or items, any number of blocks for the tiles of all matrices), so that what reads the same
// weights runs at the same time; blocks of 128. Shared memory: kStages pieces for each warp.
template <class Type>
DEVICE void gemv(const Products& all) {
  SHARED(float4, passed, [kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Pieces<Type> pieces(all, warp, lane, DYNAMIC_SHARED);
  Place now = pieces.next();
  let_next_kernel_begin();
  if (all.items == nullptr) pieces.start(0);  // while the block is still to learn which rows there are
  wait_for_earlier_kernels();
  const Share share = share_of(all, blockIdx.x, kGroupRows);
  if (share.n <= 0) return copy_async_wait<0>();  // none may be under way when the block ends
  if (all.items != nullptr) pieces.start(share.expert);
  const int segments = all.cols / Type::kLayout.segment_cols, tiles = all.tile_count();
  const LaneActivations<Type> a(all, share, segments, lane);
  for (bool is_first = warp == 0; now.tile < tiles; is_first = false, now.advance(kGemvWarps)) {
    const int first = now.piece * kTogether<Type>, left = segments - first;
    const uint8_t* piece = pieces.take();
    Terms<Type> terms[kTogether<Type>];
    const bool is_whole = kTogether<Type> == 1 || left >= kTogether<Type>;
    if (is_whole)
      piece_terms<Type, true>(piece, first, left, a, lane, terms);
    else
      piece_terms<Type, false>(piece, first, left, a, lane, terms);
    pieces.release();
    if (!is_first) wait_for_turn(warp);
    float totals[4] = {};
    if (now.piece > 0) load_fours(reinterpret_cast<const float*>(&passed[lane]), totals);
    UNROLL for (int i = 0; i < kTogether<Type>; i++)
      if (is_whole || i < left) add_terms<Type>(terms[i], totals);
    passed[lane] = {totals[0], totals[1], totals[2], totals[3]};
    const bool ends_tile = now.piece + 1 == now.pieces;
    if (!ends_tile || now.tile + static_cast<int>(gridDim.y) < tiles) give_turn_after(warp);
    if (ends_tile) store_tile<Type>(all, share, now.tile, lane, totals);
  }
}

}  // namespace
}  // namespace llamaclust::cuda
