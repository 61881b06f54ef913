// Products of a single row with types with segments of 256 columns, for one lane. Each block of 32 columns has its own
// column of the matrix unit's result: only in that column of b are its activations not 0, so a product adds to one
// column only. The sums of eight blocks are then separate, two for each lane and row of weights, and are scaled once at
// the end; with eight rows, the sums of every block must be scaled.
#pragma once

#include "eight_rows.cuh"

namespace llamaclust::cuda {
namespace {

// A lane's activations of one segment: block lane / 4, k-groups lane % 4 and lane % 4 + 4; and sums of the sub-blocks
// for which it has results.
struct RowActivations {
  uint2 q;
  uint32_t high, low;
  float scale;
};

// Integer scales of the result columns 2c and 2c + 1: each belongs to one sub-block, or to two.
template <class Type>
DEVICE void column_scales(Lines body, int c, Scale (&out)[kOf16<Type> ? 4 : 2])
  requires(kSubScaled<Type>)
{
  constexpr int count = kOf16<Type> ? 4 : 2;
  Scale all[Type::kSubBlocks];
  if constexpr (Type::kScaleLines) {
    Type::sub_scales(body + 64 * (kOf16<Type> ? c : c / 2), all);
    UNROLL for (int i = 0; i < count; i++) out[i] = kOf16<Type> || c % 2 == 0 ? all[i] : all[count + i];
  } else {
    Type::sub_scales(body, all);
    UNROLL for (int i = 0; i < count; i++)
      out[i] = c < 2 ? (c == 0 ? all[i] : all[count + i]) : (c == 2 ? all[2 * count + i] : all[3 * count + i]);
  }
}

template <class Type>
class OneRow {
 public:
  static constexpr int kOutputs = 1;  // Row lane / 4 of the weights, or in lanes with lane % 4 >= 2 the row 8 further.

  DEVICE OneRow(const Products& all, const Share& share, int segments, int lane) : lane_(lane) {
    const int row = activation_row(all, share, 0);
    all_ = reinterpret_cast<const Activations256*>(all.activations) + static_cast<size_t>(row / 8) * segments;
    row_ = row % 8;
  }

  // Loads the activations of the piece that follows the one of the next call of terms().
  DEVICE void look_ahead(int piece) {
    now_ = next_;
    const Activations256& a = all_[piece];
    const int place = 4 * row_ + lane_ % 4;
    next_.q = a.q[lane_ / 4][place];
    if constexpr (Type::kHasMin) next_.high = a.high[place], next_.low = a.low[place];
    next_.scale = a.scale[row_];
  }

  template <bool>
  DEVICE void terms(const uint8_t* piece, int, int, Terms<Type, 1> (&terms)[1]) const {
    const Segment w = segment_of<Type>(piece, 0, 1);
    int32_t sums[2][4] = {};
    UNROLL for (int i = 0; i < 8; i++) {
      int32_t weights[4];
      load_weights<Type>(w.body, i, lane_, weights);
      const bool is_mine = lane_ / 4 == i;
      add_block(weights, is_mine ? static_cast<int32_t>(now_.q.x) : 0, is_mine ? static_cast<int32_t>(now_.q.y) : 0, i, sums);
    }
    const Lines rows[2] = {{w.body, lane_ / 4}, {w.body, lane_ / 4 + 8}};
    int32_t total[2], minus[2] = {};
    UNROLL for (int r = 0; r < 2; r++) {
      total[r] = scaled(rows[r], sums, r);
      if constexpr (Type::kHasMin) minus[r] = minus_min(mins_of<Type>(rows[r], lane_ % 4));
    }
    const Lines tail{w.tail, lane_ / 4 + 8 * (lane_ % 4 / 2)};
    terms[0][0][0] = {mul(Type::scale(tail), now_.scale), __int2float_rn(of_quad(total))};
    if constexpr (Type::kHasMin) terms[0][0][1] = {mul(Type::min(tail), now_.scale), __int2float_rn(of_quad(minus))};
  }

  DEVICE void store(const Product& p, const Share& share, const float (&totals)[1]) const {
    if (lane_ % 2 != 0) return;
    const int row = 16 * p.block + lane_ / 4 + 8 * (lane_ % 4 / 2);
    store_result(result_of(p, share), p.bias_rows, out_row(p, share, 0), row, totals[0]);
  }

 private:
  // Halves of blocks have separate sums in types with sub-blocks of 16 columns. Consecutive products add to different
  // sums, so that they need not wait for each other.
  DEVICE static void add_block(const int32_t (&w)[4], int32_t b, int32_t b_2, int i, int32_t (&sums)[2][4]) {
    if constexpr (kOf16<Type>) {
      multiply_k16(sums[0], {w[0], w[1]}, {b});
      multiply_k16(sums[1], {w[2], w[3]}, {b_2});
    } else {
      multiply_k32(sums[i % 2], w, {b, b_2});
    }
  }

  // Returns the lane's part of the sum of its row r (0 or 1).
  DEVICE int32_t scaled(Lines row, const int32_t (&sums)[2][4], int r) const {
    const int32_t *first = sums[0] + 2 * r, *second = sums[1] + 2 * r;
    if constexpr (!kSubScaled<Type>) {
      return first[0] + second[0] + first[1] + second[1];
    } else if constexpr (kOf16<Type>) {
      Scale scales[4];
      column_scales<Type>(row, lane_ % 4, scales);
      return first[0] * scales[0] + second[0] * scales[1] + first[1] * scales[2] + second[1] * scales[3];
    } else {
      Scale scales[2];
      column_scales<Type>(row, lane_ % 4, scales);
      return (first[0] + second[0]) * scales[0] + (first[1] + second[1]) * scales[1];
    }
  }

  DEVICE int32_t minus_min(int32_t mins) const {
    return -(128 * dp4a(mins, static_cast<int32_t>(now_.high), 0) + dp4a(mins, static_cast<int32_t>(now_.low), 0));
  }

  // Sums both rows over the four lanes. Each lane gets the sum of its output.
  DEVICE int32_t of_quad(const int32_t (&x)[2]) const {
    const bool is_second = lane_ % 4 >= 2;
    const int32_t mine = (is_second ? x[1] : x[0]) + __shfl_xor_sync(kAllLanes, is_second ? x[0] : x[1], 2);
    return mine + __shfl_xor_sync(kAllLanes, mine, 1);
  }

  const Activations256* all_;
  int row_, lane_;
  RowActivations now_{}, next_{};
};

}  // namespace
}  // namespace llamaclust::cuda
