// Products of up to eight rows, for one lane. A matrix unit computes eight rows, so fewer rows take as long.
#pragma once

#include "pieces.cuh"

namespace llamaclust::cuda {
namespace {

// The contribution of a segment: total = fma(factor, sum, total). Types with a min have a second one.
struct Term {
  float factor, sum;
};
// Terms of a lane's outputs.
template <class Type, int outputs>
using Terms = Term[outputs][Type::kHasMin ? 2 : 1];

// The location of a lane's activations: those that it multiplies (row lane / 4), and the scales of its results (rows 2c
// and 2c + 1, with c = lane % 4).
template <class Type>
struct LaneActivations {
  const Activations<Type>* all;
  int first, first_of[2];  // Index of the first segment of each group of rows.
  int quants, scales[2];   // Offsets in a segment.
  bool one;                // There is one row, so only its results count.
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
DEVICE void segment_terms(const Segment& w, const LaneActivations<Type>& a, int s, int lane, Terms<Type, 4>& terms)
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

// Scales of block i of a segment. Lines are read once for all blocks and unpacked for each block, which takes few
// registers.
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
DEVICE void segment_terms(const Segment& w, const LaneActivations<Type>& a, int s, int lane, Terms<Type, 4>& terms)
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
  float minus[4] = {};
  if constexpr (Type::kHasMin) {
    const int32_t mins[2] = {mins_of<Type>(rows[0], lane % 4), mins_of<Type>(rows[1], lane % 4)};
    minus_mins(mins, quants.high[a.quants], quants.low[a.quants], minus, a.one);
  }
  const RowPair pair = row_scales<Type>(w.tail, lane);
  UNROLL for (int n = 0; n < 4; n++) {
    const float scale = a.scale(n % 2, s);
    terms[n][0] = {mul(pair.scale[n / 2], scale), __int2float_rn(total[n])};
    if constexpr (Type::kHasMin) terms[n][1] = {mul(pair.min[n / 2], scale), minus[n]};
  }
}

// Up to eight rows of activations. A lane's outputs have the order of d in mma.cuh: n / 2 selects the row of weights, n
// % 2 the row of activations.
template <class Type>
class EightRows {
 public:
  static constexpr int kOutputs = 4;

  DEVICE EightRows(const Products& all, const Share& share, int segments, int lane)
      : activations_(all, share, segments, lane), lane_(lane) {}

  DEVICE void look_ahead(int) {}

  // Computes the terms of segments first, first + 1, ...; `left` segments remain. `whole` says that these are at least
  // kTogether, so that all have one address with constant offsets. Otherwise each has its own address, which costs as
  // much as the arithmetic.
  template <bool whole>
  DEVICE void terms(const uint8_t* piece, int first, int left, Terms<Type, kOutputs> (&terms)[kTogether<Type>]) const {
    UNROLL for (int i = 0; i < kTogether<Type>; i++) {
      const int at = whole || i < left ? i : left - 1;
      segment_terms<Type>(segment_of<Type>(piece, at, whole ? kTogether<Type> : left), activations_, first + at, lane_,
                          terms[i]);
    }
  }

  DEVICE void store(const Product& p, const Share& share, const float (&totals)[kOutputs]) const {
    const Matrix result = result_of(p, share);
    UNROLL for (int n = 0; n < kOutputs; n++) {
      const int row = 2 * (lane_ % 4) + n % 2;
      if (row < share.n)
        store_result(result, p.bias_rows, out_row(p, share, row), 16 * p.block + lane_ / 4 + 8 * (n / 2), totals[n]);
    }
  }

 private:
  LaneActivations<Type> activations_;
  int lane_;
};

}  // namespace
}  // namespace llamaclust::cuda
