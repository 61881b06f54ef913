// Products of many rows. A block has 64 rows of activations, and a tile of sixteen rows of weights for each of its 4 to
// 16 warps.
//
// Activations of 256 columns are copied to shared memory while the previous ones are multiplied (38 to 41 KB in total,
// without bank conflicts: a warp reads 256 bytes in order). Weights are decoded once for all 64 rows, one block of 32
// columns ahead. With at most 128 registers per thread, sixteen warps share a multiprocessor.
//
// Per matrix instruction (16 x 8 x 32), a warp issues one shared load and, for types with segments of 256, four integer
// multiply-adds by sub-block scales (eight for sub-blocks of 16 columns); for Q4_K thirteen instructions in total. On
// compute capability 8.6, 8.9 and 12.0, a matrix instruction takes 16 cycles of a quarter of a multiprocessor and is
// the bottleneck. On 8.0 it takes 8, as many as the load and the multiply-adds. Types with segments of 32 have twelve
// float operations instead, which are their bottleneck. Compute capability 9.0 uses wgmma.cuh instead.
#pragma once

#include "many_rows.cuh"

namespace llamaclust::cuda {
namespace {

constexpr int kBlockRows = 64, kBlockGroups = kBlockRows / kGroupRows;

// Both variants of add_stage get the weights of the stage's first 32 columns in `next`, and load those of the next
// columns during products.
template <class Type>
DEVICE void add_stage(const uint8_t* tile, int first, int count, int segments, int groups, const Stage<Type, kBlockGroups>& stage,
                      uint32_t*, int lane, int32_t (&next)[4], Totals<kBlockGroups>& totals)
  requires(!kWide<Type>)
{
  Segment segment = segment_of<Type>(tile, first, segments);
  for (int s = 0; s < count; s++) {
    const int32_t w[4] = {next[0], next[1], next[2], next[3]};
    const RowPair rows = row_scales<Type>(segment.tail, lane);
    if (s + 1 < count) segment = segment_of<Type>(tile, first + s + 1, segments);
    load_weights<Type>(segment.body, 0, lane, next);
    UNROLL for (int begin = 0; begin < kBlockGroups; begin += kGroupsTogether<Type>) if (begin < groups)
      UNROLL for (int g = begin; g < begin + kGroupsTogether<Type>; g++) {
        const Activations32& a = stage[g][s];
        const uint2 q = a.q[lane];
        int32_t sums[4] = {kFloatBegin, kFloatBegin, kFloatBegin, kFloatBegin};
        multiply_k32(sums, w, {static_cast<int32_t>(q.x), static_cast<int32_t>(q.y)});
        UNROLL for (int n = 0; n < 4; n++) {
          const int place = 2 * (lane % 4) + n % 2;
          float& total = totals[g][n];
          total = fma(mul(rows.scale[n / 2], a.scale[place]), sum_as_float(sums[n]), total);
          if constexpr (Type::kHasMin) total = fma(rows.min[n / 2], a.scaled_sum[place], total);
        }
      }
  }
}

template <class Type>
DEVICE void add_stage(const uint8_t* tile, int s, int, int segments, int groups, const Stage<Type, kBlockGroups>& stage,
                      uint32_t* shared_scales, int lane, int32_t (&next)[4], Totals<kBlockGroups>& totals)
  requires(kWide<Type>)
{
  const Segment segment = segment_of<Type>(tile, s, segments);
  constexpr int bytes = Type::kLayout.body_bytes + Type::kLayout.tail_bytes;
  if (s + 2 < segments && lane < (bytes + 127) / 128) prefetch(segment.body + 2 * bytes + 128 * lane);
  int32_t sums[kBlockGroups][4] = {};
  NO_UNROLL for (int i = 0; i < 8; i++) {
    const int32_t w[4] = {next[0], next[1], next[2], next[3]};
    load_weights<Type>(segment.body, i < 7 ? i + 1 : 7, lane, next);
    Scale scales[2][2];
    read_scales<Type>(shared_scales, i, lane, scales);
    UNROLL for (int begin = 0; begin < kBlockGroups; begin += kGroupsTogether<Type>) if (begin < groups)
      UNROLL for (int g = begin; g < begin + kGroupsTogether<Type>; g++)
        add_products<Type>(w, stage[g][0].q[i][lane], scales, sums[g]);
  }
  add_sums<Type, kBlockGroups>(segment, groups, stage, lane, sums, totals);
}

// Grid: (groups of 64 rows, or items; tiles / warps rounded up for each matrix), so that blocks that read the same
// weights run at the same time. Blocks of 128 to 512 threads. Shared memory: two stages, and the scales of each warp.
template <class Type>
DEVICE void gemm(const Products& all) {
  SHARED(int32_t, of_row, [kBlockRows]);
  SHARED(Matrix, matrix, [1]);  // Used at the end; it is in shared memory to save registers.
  const Product p = product_of(all, blockDim.x / kWarp, blockIdx.y);
  const Share share = share_of(p, blockIdx.x, kBlockRows);
  if (share.n <= 0) return;
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (thread < kBlockRows) of_row[thread] = activation_row(p, share, thread);
  if (thread == 0) matrix[0] = result_of(p, share);
  __syncthreads();
  auto* stages = reinterpret_cast<Stage<Type, kBlockGroups>*>(DYNAMIC_SHARED);
  uint32_t* scales = reinterpret_cast<uint32_t*>(stages + 2) + warp * 16 * kScaleWords<Type>;
  const int segments = p.cols / Type::kLayout.segment_cols, groups = (share.n + 7) / 8;
  // A tile beyond the last one repeats it, and its results are discarded.
  const int tile = p.block * warps + warp, last_tile = p.matrix().tile_count() - 1;
  const uint8_t* weights = tile_of(p, share, tile < last_tile ? tile : last_tile);
  constexpr int at_once = kStageSegments<Type>;
  const auto count_of = [&](int first) { return segments - first < at_once ? segments - first : at_once; };
  Totals<kBlockGroups> totals = {};
  copy_stage<Type, kBlockGroups>(p, share, of_row, groups, 0, count_of(0), stages[0]);
  for (int first = 0, at = 0; first < segments; first += at_once, at ^= 1) {
    const int after = first + at_once;
    if (after < segments) copy_stage<Type, kBlockGroups>(p, share, of_row, groups, after, count_of(after), stages[at ^ 1]);
    const uint8_t* body = segment_of<Type>(weights, first, segments).body;
    int32_t next[4];
    share_scales<Type>(body, lane, scales);
    load_weights<Type>(body, 0, lane, next);
    if (after < segments)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncthreads();
    add_stage<Type>(weights, first, count_of(first), segments, groups, stages[at], scales, lane, next, totals);
    __syncthreads();
  }
  if (tile <= last_tile) store_totals(p, share, matrix[0], tile, lane, totals);
}

}  // namespace
}  // namespace llamaclust::cuda
