// Products of up to eight rows: a block has a tile of sixteen rows of weights, its warps take segments in turn. All
// eight rows cost what one does, since a matrix unit takes eight; GPUs without one have a shorter way for one row.
//
// Bound by memory: each weight is read once, straight into registers, and loads of a segment, or of four of 32 columns,
// are independent of each other, so that a warp has one to three kilobytes under way; sixteen warps on a multiprocessor
// are enough, and leave 128 registers a thread to hold them. Where memory is fastest, issuing instructions comes next:
// of 32 columns addresses would take as many as arithmetic, so four segments share theirs. Activations come from the
// first cache: all blocks of a multiprocessor read the same. A segment's result is two floats an output (four with
// mins) in shared memory; after `round` segments one thread an output folds them in k order. Rounds are as long as
// shared memory allows: most matrices take one.
#pragma once

#include "matmul.cuh"

namespace llamaclust::cuda {
namespace {

// What a segment adds: total = fma(factor, sum, total), and for types with a min another one.
struct Term {
  float factor, sum;
};
template <class Type>
constexpr int kTermsEach = Type::kHasMin ? 2 : 1;
template <class Type>
using Terms = Term[4][kTermsEach<Type>];
// From one row of activations to the next, in outputs: sixteen and some that keep lanes on different banks.
template <class Type>
constexpr int kTermStride = Type::kHasMin ? 17 : 18;

// Segments that a warp reads before it computes any.
template <class Type>
constexpr int kTogether = kWide<Type> ? 1 : 4;

// Blocks of 256 threads on a multiprocessor: three where 80 registers hold all that is read ahead.
template <class Type>
constexpr int kGemvBlocks = kWide<Type> || Type::kHasMin || Type::kLayout.body_bytes % 256 != 0 ? 2 : 3;

// Where a lane finds its activations: those it multiplies (row lane / 4), and the scales of its results (rows 2 c, 2 c
// + 1).
template <class Type>
struct LaneActivations {
  const Activations<Type>* all;
  int first, first_of[2];  // of the groups' segments
  int quants, scales[2];   // inside a segment
  bool one;                // row, whose results count alone
  DEVICE LaneActivations(const Product& p, const Share& share, int segments, int lane)
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

// Results are those of d in mma.cuh: n / 2 says which row of weights, n % 2 which row of activations.
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

// Where a segment of a round has its terms in shared memory.
template <class Type>
DEVICE int place_of(int s, int rows, int row, int output) {
  return ((s * rows + row) * kTermStride<Type> + output) * kTermsEach<Type>;
}

template <class Type>
DEVICE void share_terms(const Terms<Type>& terms, int s, int rows, int lane, Term* shared) {
  UNROLL for (int n = 0; n < 4; n++) {
    const int row = 2 * (lane % 4) + n % 2;
    if (row < rows) UNROLL for (int k = 0; k < kTermsEach<Type>; k++)
      shared[place_of<Type>(s, rows, row, lane / 4 + 8 * (n / 2)) + k] = terms[n][k];
  }
}

// An output's total with the terms of `count` segments, in order. Some terms are loaded together, so that additions wait
// for each other alone and not for shared memory, too.
template <class Type>
DEVICE float fold(const Term* terms, int count, int rows, float total) {
  constexpr int ahead = 8;
  const int step = place_of<Type>(1, rows, 0, 0);
  int first = 0;
  NO_UNROLL for (; first + ahead <= count; first += ahead) {
    Term next[ahead][kTermsEach<Type>];
    UNROLL for (int i = 0; i < ahead; i++) UNROLL for (int k = 0; k < kTermsEach<Type>; k++)
      next[i][k] = terms[(first + i) * step + k];
    UNROLL for (int i = 0; i < ahead; i++) UNROLL for (int k = 0; k < kTermsEach<Type>; k++)
      total = fma(next[i][k].factor, next[i][k].sum, total);
  }
  NO_UNROLL for (; first < count; first++)
    UNROLL for (int k = 0; k < kTermsEach<Type>; k++)
      total = fma(terms[first * step + k].factor, terms[first * step + k].sum, total);
  return total;
}

// Segment i of those from a multiple of kTogether on, all of which are there: how far it is, a compiler knows.
template <class Type>
DEVICE Segment segment_after(const uint8_t* first, int i) {
  constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
  constexpr int group = kGroupSegments<Type>;
  static_assert(kTogether<Type> % group == 0);
  const uint8_t* bodies = first + i / group * group * (body_bytes + tail_bytes);
  return {bodies + i % group * body_bytes, bodies + group * body_bytes + i % group * tail_bytes};
}

// Segments from `first` on, of which `left` are left in the round. Whole: kTogether or more are, so that they have one
// address and distances from it; else each has its own, which costs as much as its arithmetic.
template <class Type, bool whole>
DEVICE void add_segments(const uint8_t* tile, int first, int left, int segments, const LaneActivations<Type>& a,
                         int rows, int lane, Term* to) {
  constexpr int together = kTogether<Type>, bytes = Type::kLayout.body_bytes + Type::kLayout.tail_bytes;
  Terms<Type> terms[together];
  UNROLL for (int i = 0; i < together; i++) {
    const int s = first + (whole || i < left ? i : left - 1);
    const Segment w = whole ? segment_after<Type>(tile + static_cast<size_t>(first) * bytes, i)
                            : segment_of<Type>(tile, s, segments);
    segment_terms<Type>(w, a, s, lane, terms[i]);
  }
  UNROLL for (int i = 0; i < together; i++)
    if (whole || i < left) share_terms<Type>(terms[i], i, rows, lane, to);
}

// Asks for the weights that a warp reads first, while it is still to learn which rows there are.
template <class Type>
DEVICE void prefetch_weights(const Product& p, int warp, int lane) {
  constexpr int bytes = Type::kLayout.body_bytes + Type::kLayout.tail_bytes, piece = kTogether<Type> * bytes;
  const int from = warp * piece + 128 * lane;
  if (128 * lane < piece && from < p.tile_bytes)
    prefetch(p.matrix().tiles + static_cast<size_t>(p.block) * p.tile_bytes + from);
}

// Grid: (groups of eight rows or items, tiles of all matrices), so that what reads the same weights runs at the same
// time; blocks of 32 to 256 threads, sixteen an output row at least. Shared memory: `round` segments of n rows of
// kTermStride outputs: all segments, or a multiple of kTogether.
template <class Type>
DEVICE void gemv(const Products& all, int round) {
  constexpr int together = kTogether<Type>;
  const Product p = product_of(all, 1);
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (p.items == nullptr) prefetch_weights<Type>(p, warp, lane);
  const Share share = share_of(p, blockIdx.x, kGroupRows);
  if (share.n <= 0) return;
  auto* shared = reinterpret_cast<Term*>(DYNAMIC_SHARED);
  const int segments = p.cols / Type::kLayout.segment_cols;
  const LaneActivations<Type> a(p, share, segments, lane);
  const uint8_t* tile = tile_of(p, share, p.block);
  float total = 0.0f;
  for (int begin = 0; begin < segments; begin += round) {
    const int count = segments - begin < round ? segments - begin : round;
    for (int first = together * warp; first < count; first += together * warps) {
      if constexpr (kWide<Type>) {
        Terms<Type> terms;
        segment_terms<Type>(segment_of<Type>(tile, begin + first, segments), a, begin + first, lane, terms);
        share_terms<Type>(terms, first, share.n, lane, shared);
      } else {
        Term* to = shared + place_of<Type>(first, share.n, 0, 0);
        const int left = count - first;
        if (left >= together)
          add_segments<Type, true>(tile, begin + first, left, segments, a, share.n, lane, to);
        else
          add_segments<Type, false>(tile, begin + first, left, segments, a, share.n, lane, to);
      }
    }
    __syncthreads();
    if (thread < 16 * share.n)
      total = fold<Type>(shared + place_of<Type>(0, share.n, thread / 16, thread % 16), count, share.n, total);
    __syncthreads();
  }
  if (thread >= 16 * share.n) return;
  store_result(result_of(p, share), p.bias_rows, out_row(p, share, thread / 16), 16 * p.block + thread % 16, total);
}

}  // namespace
}  // namespace llamaclust::cuda
