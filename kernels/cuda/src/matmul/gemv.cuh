// Products of up to eight rows: a block goes through tiles of sixteen rows of weights, its warps take pieces of them in
// turn. GPUs without a matrix unit, and from 9.0 on all types of 256 columns, have a shorter way for one row.
//
// Bound by memory: each weight is read once, and from 8.0 on pieces are requested ahead, also of the next tile: one or two
// of every warp are under way at any time, from 9.0 on as many as shared memory has room for, the first ones before the
// kernels before are done. Older GPUs have other warps meanwhile. Where memory is fastest, issuing instructions comes next.
// Activations come from the first cache: all blocks of a multiprocessor read the same. What a piece adds to outputs is in
// registers, two floats a segment and output (four with mins), until the warp before is done with the piece before: totals
// pass from warp to warp, so that all segments are added in k order while other warps multiply.
#pragma once

#include "term_queue.cuh"
#include "turns.cuh"

namespace llamaclust::cuda {
namespace {

// Blocks on a multiprocessor: 128 threads with 96 registers each, 128 without matrix units; from 9.0 on 288 threads with 112.
#if LLAMACLUST_ARCH >= 900
inline constexpr int kGemvBlocks = 2;
#elif LLAMACLUST_ARCH < 750
inline constexpr int kGemvBlocks = 4;
#else
inline constexpr int kGemvBlocks = 5;
#endif
inline constexpr int kGemvThreads = kWarp * (LLAMACLUST_ARCH >= 900 ? kGemvWarps + 1 : kGemvWarps);

template <class Type, int outputs>
DEVICE void add_terms(const Terms<Type, outputs>& terms, float (&totals)[outputs]) {
  UNROLL for (int n = 0; n < outputs; n++) UNROLL for (const Term& term : terms[n])
    totals[n] = fma(term.factor, term.sum, totals[n]);
}

// All pieces of a warp, of up to eight rows. `passed`: the lane's totals, which go from warp to warp.
template <class Type>
DEVICE void multiply_pieces(const Products& all, const Share& share, Pieces<Type>& pieces, Place now, Turns& turns, int lane,
                            float4& passed) {
  using Rows = EightRows<Type>;
  const int tiles = all.tile_count(), segments = all.cols / Type::kLayout.segment_cols;
  const Rows rows(all, share, segments, lane);
  for (bool is_first = now.piece == 0 && now.tile == blockIdx.y; now.tile < tiles; is_first = false, now.advance(kGemvWarps)) {
    const int first = now.piece * kTogether<Type>, left = segments - first;
    const uint8_t* piece = pieces.take();
    Terms<Type, Rows::kOutputs> terms[kTogether<Type>];
    const bool is_whole = kTogether<Type> == 1 || left >= kTogether<Type>;
    if (is_whole)
      rows.template terms<true>(piece, first, left, terms);
    else
      rows.template terms<false>(piece, first, left, terms);
    pieces.release();
    if (!is_first) turns.wait();
    float totals[Rows::kOutputs] = {};
    if (now.piece > 0) load_fours(reinterpret_cast<const float*>(&passed), totals);
    UNROLL for (int i = 0; i < kTogether<Type>; i++)
      if (is_whole || i < left) add_terms<Type, Rows::kOutputs>(terms[i], totals);
    passed = {totals[0], totals[1], totals[2], totals[3]};
    const bool ends_tile = now.piece + 1 == now.pieces;
    if (!ends_tile || now.tile + static_cast<int>(gridDim.y) < tiles) turns.give();
    if (ends_tile) rows.store(product_of(all, 1, now.tile), share, totals);
  }
}

#if LLAMACLUST_ARCH >= 900
// Grid: (groups of eight rows or items, any number of blocks for the tiles of all matrices), so that what reads the same
// weights runs at the same time; blocks of nine warps, of which the last one adds. Shared memory: pieces for each of the
// others (pieces.cuh).
template <class Type>
DEVICE void gemv(const Products& all) {
  SHARED(float4, passed, [kWarp]);
  SHARED(uint64_t, turn_arrivals, [kGemvWarps]);
  SHARED(RoundTerms<Type>, terms, [kRounds]);
  SHARED(QueueArrivals, queue_arrivals, [1]);
  SHARED(float, ended, [kGemvWarps][kWarp]);
  const int lane = threadIdx.x % kWarp;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);  // so that the compiler knows it to be uniform
  const bool multiplies = warp < kGemvWarps;
  Pieces<Type> pieces(all, warp, lane, DYNAMIC_SHARED);
  const Place first = pieces.next();
  Turns turns(warp, lane, turn_arrivals);
  const TermQueue<Type> queue(terms, queue_arrivals[0]);
  let_next_kernel_begin();
  if (multiplies) {
    pieces.init();
    if (all.items == nullptr) pieces.start(0);  // while the block is still to learn which rows there are
    if (lane == 0) turns.init();
  } else if (lane < kRounds) {
    queue.init(lane);
  }
  __syncthreads();
  wait_for_earlier_kernels();
  const Share share = share_of(all, blockIdx.x, kGroupRows);
  if (share.n <= 0) {
    if (multiplies && all.items == nullptr) pieces.drop(first);
    return;
  }
  if (multiplies && all.items != nullptr) pieces.start(share.expert);
  if (kWide<Type> && share.n == 1) {
    if constexpr (kWide<Type>) {
      if (multiplies)
        put_terms(all, share, pieces, first, warp, lane, queue);
      else
        add_terms_in_order(all, share, Place{static_cast<int>(blockIdx.y), 0, first.pieces}, lane, queue, ended);
    }
  } else if (multiplies) {
    multiply_pieces(all, share, pieces, first, turns, lane, passed[lane]);
  }
}
#else
// The same with blocks of four warps.
template <class Type>
DEVICE void gemv(const Products& all) {
  SHARED(float4, passed, [kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Pieces<Type> pieces(all, warp, lane, DYNAMIC_SHARED);
  const Place first = pieces.next();
  Turns turns(warp);
  if (all.items == nullptr) pieces.start(0);  // while the block is still to learn which rows there are
  const Share share = share_of(all, blockIdx.x, kGroupRows);
  if (share.n <= 0) return pieces.drop(first);
  if (all.items != nullptr) pieces.start(share.expert);
  multiply_pieces(all, share, pieces, first, turns, lane, passed[lane]);
}
#endif

}  // namespace
}  // namespace llamaclust::cuda
