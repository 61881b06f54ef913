// Products of up to eight rows. A block computes tiles of sixteen rows of weights, whose pieces its warps take in turn.
// For one row there is a shorter variant, on GPUs without a matrix unit, and from compute capability 9.0 for all types
// with segments of 256 columns.
//
// Limited by memory: each weight is read once. From 8.0, pieces are requested ahead, also those of the next tile. Each
// warp has one or two in flight at any time; from 9.0, as many as fit into shared memory, and the first requests
// precede the end of earlier kernels. Older GPUs run other warps during a load. Where memory is fastest, issuing
// instructions is the next bottleneck. Activations come from the L1 cache, because all blocks of a multiprocessor read
// the same ones.
//
// A warp keeps the contribution of a piece to the outputs in registers (two floats per segment and output, four with
// mins) until the previous warp has added the previous piece. Totals pass from warp to warp, so all segments are added
// in the order of k while other warps multiply. Passing takes 160 cycles. Therefore, from 9.0, a warp multiplies
// several adjacent pieces of types with segments of 256 columns before its turn, and keeps their contributions in
// shared memory.
#pragma once

#include "one_row.cuh"
#include "turns.cuh"

namespace llamaclust::cuda {
namespace {

// Blocks per multiprocessor: 128 threads with 96 registers each, or 128 registers without matrix units; from 9.0, 256
// threads with 128 registers.
#if LLAMACLUST_ARCH >= 900
inline constexpr int kGemvBlocks = 2;
#elif LLAMACLUST_ARCH < 750
inline constexpr int kGemvBlocks = 4;
#else
inline constexpr int kGemvBlocks = 5;
#endif
template <class Type>
constexpr bool kHasOneRow = kWide<Type> && LLAMACLUST_ARCH >= 900;

template <class Type, int outputs>
DEVICE void add_terms(const Terms<Type, outputs>& terms, float (&totals)[outputs]) {
  UNROLL for (int n = 0; n < outputs; n++) UNROLL for (const Term& term : terms[n])
    totals[n] = fma(term.factor, term.sum, totals[n]);
}

template <int count>
DEVICE void load_totals(const float* from, float (&to)[count]) {
  if constexpr (count % 4 == 0)
    load_fours(from, to);
  else
    UNROLL for (int i = 0; i < count; i++) to[i] = from[i];
}
template <int count>
DEVICE void store_totals(float* to, const float (&from)[count]) {
  if constexpr (count == 4)
    store_four(to, {from[0], from[1], from[2], from[3]});
  else
    UNROLL for (int i = 0; i < count; i++) to[i] = from[i];
}

// Terms of a turn's pieces, for each lane. Turns of several pieces exist only for types with segments of 256 columns.
template <class Type, int outputs>
struct KeptTerms {
  static constexpr int kParts = Type::kHasMin ? 2 : 1;
  float2* lane;  // The lane's first term.
  int pieces = 0;

  DEVICE float2& at(int piece, int n, int part) const { return lane[((piece * outputs + n) * kParts + part) * kWarp]; }

  DEVICE void keep(const Terms<Type, outputs>& terms) {
    UNROLL for (int n = 0; n < outputs; n++) UNROLL for (int part = 0; part < kParts; part++)
      at(pieces, n, part) = make_float2(terms[n][part].factor, terms[n][part].sum);
    pieces++;
  }
  DEVICE void add_to(float (&totals)[outputs]) {
#pragma unroll 2
    for (int piece = 0; piece < pieces; piece++)
      UNROLL for (int n = 0; n < outputs; n++) UNROLL for (int part = 0; part < kParts; part++)
        totals[n] = fma(at(piece, n, part).x, at(piece, n, part).y, totals[n]);
    pieces = 0;
  }
};

// Multiplies all pieces of a warp. `passed` has the lane's totals, which go from warp to warp; `kept_at` is the lane's
// own place.
template <class Type, class Rows>
DEVICE void multiply_pieces(const Products& all, const Share& share, Pieces<Type>& pieces, Place now, Turns& turns, Rows rows,
                            float* passed, float2* kept_at) {
  const int tiles = all.tile_count(), segments = all.cols / Type::kLayout.segment_cols;
  rows.look_ahead(now.piece());
  KeptTerms<Type, Rows::kOutputs> kept{kept_at};
  bool is_first = now.begin == 0 && now.tile == blockIdx.y;
  while (now.tile < tiles) {
    Place next = now;
    next.advance();
    rows.look_ahead(next.piece());
    const int first = now.piece() * kTogether<Type>, left = segments - first;
    const uint8_t* piece = pieces.take();
    Terms<Type, Rows::kOutputs> terms[kTogether<Type>];
    const bool is_whole = kTogether<Type> == 1 || left >= kTogether<Type>;
    if (is_whole)
      rows.template terms<true>(piece, first, left, terms);
    else
      rows.template terms<false>(piece, first, left, terms);
    pieces.release();
    if (kTogether<Type> == 1 && !now.ends_turn()) {
      kept.keep(terms[0]);
      now = next;
      continue;
    }
    if (!is_first) turns.wait();
    is_first = false;
    float totals[Rows::kOutputs] = {};
    if (now.begin > 0) load_totals(passed, totals);
    if constexpr (kTogether<Type> == 1) kept.add_to(totals);
    UNROLL for (int i = 0; i < kTogether<Type>; i++)
      if (is_whole || i < left) add_terms<Type, Rows::kOutputs>(terms[i], totals);
    store_totals(passed, totals);
    if (!now.ends_tile() || now.tile + static_cast<int>(gridDim.y) < tiles) turns.give();
    if (now.ends_tile()) rows.store(product_of(all, 1, now.tile), share, totals);
    now = next;
  }
}

// Grid: (groups of eight rows, or items; any number of blocks for the tiles of all matrices), so that blocks that read
// the same weights run at the same time. Blocks of kGemvWarps warps, each of which takes `turn` pieces in a row. Shared
// memory: pieces of each warp (pieces.cuh).
template <class Type>
DEVICE void gemv(const Products& all, int turn) {
  SHARED(float, passed, [4 * kWarp]);
  const int lane = threadIdx.x % kWarp;
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);  // Tells the compiler that it is uniform in a warp.
  Pieces<Type> pieces(all, turn, warp, lane, DYNAMIC_SHARED);
  const Place first = pieces.next();
  let_next_kernel_begin();
  if (all.items == nullptr) pieces.start(0);  // It does not depend on the rows, which the block does not know yet.
#if LLAMACLUST_ARCH >= 900
  SHARED(uint64_t, arrivals, [kGemvWarps]);
  Turns turns(warp, lane, arrivals);
  if (lane == 0) turns.init();
  __syncthreads();
#else
  Turns turns(warp);
#endif
  wait_for_earlier_kernels();
  const Share share = share_of(all, blockIdx.x, kGroupRows);
  if (share.n <= 0) {
    if (all.items == nullptr) pieces.drop(first);
    return;
  }
  if (all.items != nullptr) pieces.start(share.expert);
  const int segments = all.cols / Type::kLayout.segment_cols;
  const auto multiply = [&]<class Rows>(Rows rows) {
    multiply_pieces<Type>(all, share, pieces, first, turns, rows, passed + Rows::kOutputs * lane,
                          pieces.kept(warp, DYNAMIC_SHARED) + lane);
  };
  if constexpr (kHasOneRow<Type>)
    if (share.n == 1) return multiply(OneRow<Type>(all, share, segments, lane));
  multiply(EightRows<Type>(all, share, segments, lane));
}

}  // namespace
}  // namespace llamaclust::cuda
