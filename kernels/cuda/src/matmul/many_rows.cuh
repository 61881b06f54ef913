// Shared code of both ways to multiply many rows. A block has 64 or 128 rows of activations, which are copied to shared
// memory 256 columns at a time while the previous ones are multiplied. Each warp has a tile of sixteen rows of weights.
#pragma once

#include "matmul.cuh"

namespace llamaclust::cuda {
namespace {

constexpr int kStageBlocks = 8;  // Blocks of 32 columns.
template <class Type>
constexpr int kStageSegments = kStageBlocks / kSegmentBlocks<Type>;
// Activations of `groups` groups of eight rows.
template <class Type, int groups>
using Stage = Activations<Type>[groups][kStageSegments<Type>];

// Starts copying `count` segments of activations of `groups` groups, as thread `thread` of `threads`. of_row has the
// row numbers.
template <class Type, int most>
DEVICE void copy_lines(const Product& p, const int32_t* of_row, int groups, int first, int count, Stage<Type, most>& to,
                       int thread, int threads) {
  const int segments = p.cols / Type::kLayout.segment_cols;
  const auto* all = reinterpret_cast<const Activations<Type>*>(p.activations) + first;
  const auto from = [=](int row, int s) -> const Activations<Type>& {
    return all[static_cast<size_t>(row / 8) * segments + s];
  };
  for (int i = thread; i < groups * 128; i += threads) {  // Half of a row's quants of 32 columns.
    const int g = i / 128, block = i / 16 % 8, place = i / 2 % 8, half = i % 2;
    const int row = of_row[8 * g + place];
    if constexpr (kWide<Type>) {
      copy_async_16(to[g][0].q[block].piece(place, half), from(row, 0).q[block].piece(row % 8, half));
    } else if (block < count) {
      copy_async_16(to[g][block].q.piece(place, half), from(row, block).q.piece(row % 8, half));
    }
  }
  for (int i = thread; i < kGroupRows * most * kStageSegments<Type>; i += threads) {
    const int g = i / 8 / kStageSegments<Type>, s = i / 8 % kStageSegments<Type>, place = i % 8;
    if (g >= groups || s >= count) continue;
    const int row = of_row[8 * g + place];
    const Activations<Type>& source = from(row, s);
    copy_async_4(&to[g][s].scale[place], &source.scale[row % 8]);
    if constexpr (kWide<Type> && Type::kHasMin) {
      copy_async_16(&to[g][s].high[4 * place], &source.high[4 * (row % 8)]);
      copy_async_16(&to[g][s].low[4 * place], &source.low[4 * (row % 8)]);
    } else if constexpr (Type::kHasMin) {
      copy_async_4(&to[g][s].scaled_sum[place], &source.scaled_sum[row % 8]);
    }
  }
}

// Starts copying `count` bytes, at most `most`, by a warp.
template <int most>
DEVICE void copy_bytes_async(const uint8_t* from, SharedAddress to, int count, int lane) {
  UNROLL for (int i = 0; i < most; i += 16 * kWarp)
    if (i + 16 * lane < count) copy_async_16(to + (i + 16 * lane), from + i + 16 * lane);
}

// Copies a stage as above. If rows are consecutive, each group is copied whole by a warp.
template <class Type, int most>
DEVICE void copy_stage(const Product& p, const Share& share, const int32_t* of_row, int groups, int first, int count,
                       Stage<Type, most>& to) {
  if (p.items == nullptr) {
    constexpr int each = sizeof(Activations<Type>);
    const int segments = p.cols / Type::kLayout.segment_cols, lane = threadIdx.x % kWarp;
    for (int g = threadIdx.x / kWarp; g < groups; g += blockDim.x / kWarp) {
      const uint8_t* from = p.activations + (static_cast<size_t>(share.first / 8 + g) * segments + first) * each;
      copy_bytes_async<kStageSegments<Type> * each>(from, shared_address(to[g]), count * each, lane);
    }
  } else {
    copy_lines<Type, most>(p, of_row, groups, first, count, to, threadIdx.x, blockDim.x);
  }
  copy_async_commit();
}

// The sums of a warp: for each group of eight rows in the order of d in mma.cuh.
template <int groups>
using Totals = float[groups][4];
// Number of groups that are computed together, as many as registers allow: missing groups then cost little, but loads
// and products overlap.
template <class Type>
constexpr int kGroupsTogether = kOf16<Type> ? 2 : 4;

// Words of a row's sub-block scales in shared memory. A warp's tile has them as int16 [row][sub-block], two per word;
// rows start in different banks.
template <class Type>
constexpr int kScaleWords = kSubScaled<Type> ? Type::kSubBlocks / 2 + 1 : 0;
template <class Type>
DEVICE void share_scales(const uint8_t* body, int lane, uint32_t* shared) {
  if constexpr (kSubScaled<Type>) {
    Scale scales[Type::kSubBlocks];
    Type::sub_scales({body, lane % 16}, scales);
    if (lane < 16) UNROLL for (int i = 0; i < Type::kSubBlocks / 2; i++)
      shared[lane * kScaleWords<Type> + i] = (scales[2 * i] & 0xffff) | static_cast<uint32_t>(scales[2 * i + 1]) << 16;
    __syncwarp();
  }
}
// Reads the scales of rows lane / 4 and lane / 4 + 8: those of two sub-blocks of 16 columns, or of one of 32.
template <class Type>
DEVICE void read_scales(const uint32_t* shared, int i, int lane, Scale (&scales)[2][2]) {
  if constexpr (kSubScaled<Type>) UNROLL for (int r = 0; r < 2; r++) {
    const uint32_t* row = shared + (lane / 4 + 8 * r) * kScaleWords<Type>;
    const uint32_t word = kOf16<Type> ? row[i] : row[i / 2] >> i % 2 * 16;
    scales[r][0] = static_cast<int16_t>(word);
    scales[r][1] = static_cast<int16_t>(word >> 16);
  }
}

// Adds a segment's integer sums, and its mins, to the totals.
template <class Type, int most>
DEVICE void add_sums(const Segment& segment, int groups, const Stage<Type, most>& stage, int lane,
                     const int32_t (&sums)[most][4], Totals<most>& totals) {
  const RowPair rows = row_scales<Type>(segment.tail, lane);
  int32_t mins[2] = {0, 0};
  if constexpr (Type::kHasMin) UNROLL for (int r = 0; r < 2; r++)
    mins[r] = mins_of<Type>({segment.body, lane / 4 + 8 * r}, lane % 4);
  UNROLL for (int begin = 0; begin < most; begin += kGroupsTogether<Type>) if (begin < groups)
    UNROLL for (int g = begin; g < begin + kGroupsTogether<Type>; g++) {
      const Activations256& a = stage[g][0];
      float minus[4] = {};
      if constexpr (Type::kHasMin) minus_mins(mins, a.high[lane], a.low[lane], minus);
      UNROLL for (int n = 0; n < 4; n++) {
        const float scale = a.scale[2 * (lane % 4) + n % 2];
        float& total = totals[g][n];
        total = fma(mul(rows.scale[n / 2], scale), __int2float_rn(sums[g][n]), total);
        if constexpr (Type::kHasMin) total = fma(mul(rows.min[n / 2], scale), minus[n], total);
      }
    }
}

template <int groups>
DEVICE void store_totals(const Product& p, const Share& share, const Matrix& matrix, int tile, int lane,
                         const Totals<groups>& totals) {
  const int row = 16 * tile + lane / 4;
  const bool there[2] = {row < matrix.out_rows, row + 8 < matrix.out_rows}, has_bias = matrix.bias != nullptr;
  float bias[2] = {};
  UNROLL for (int r = 0; r < 2; r++)
    if (has_bias && there[r]) bias[r] = matrix.bias[(row + 8 * r) * p.bias_rows];
  UNROLL for (int g = 0; g < groups; g++) UNROLL for (int column = 0; column < 2; column++) {
    const int i = 8 * g + 2 * (lane % 4) + column;
    float* out = matrix.out + static_cast<size_t>(out_row(p, share, i < share.n ? i : 0)) * matrix.out_rows + row;
    UNROLL for (int r = 0; r < 2; r++) {
      const float x = totals[g][2 * r + column];
      if (i < share.n && there[r]) out[8 * r] = canonical(has_bias ? add(x, bias[r]) : x);
    }
  }
}

}  // namespace
}  // namespace llamaclust::cuda
