// Shared code of products with quantized weights, for few and for many rows: tiles in the CPU's layout
// (kernels/cpu/native/level/quant_types.h) as operands of matrix units.
//
// A tile has sixteen rows of weights, and a k-group has four bytes of each row. Register a[0] of lane 4 * r + c is
// k-group c of row r (mma.cuh), so every lane reads and decodes its own words: from the tile itself for many rows, from
// a copy in shared memory for few. The eight rows of a line that a warp reads at once are a sector of 32 bytes. The
// order of float operations is that of kernels/cpu/native/level/matmul/segment.h: sums within a segment are exact
// integers; then total = fma(scale_w * scale_a, sum, total), segment after segment in the order of k, with a second fma
// for types with a min.
#pragma once

#include "activations.cuh"
#include "level/quants/decoder.h"
#include "mma.cuh"
#include "rows.cuh"

namespace llamaclust::cuda {
namespace {

template <class Type>
constexpr bool kWide = Type::kLayout.segment_cols == 256;
template <class Type>
constexpr int kSegmentBlocks = Type::kLayout.segment_cols / 32;
template <class Type>
constexpr bool kOf16 = Type::kSubBlocks == 16;  // Sub-blocks have 16 columns instead of 32.
template <class Type>
constexpr bool kSubScaled = requires { Type::sub_scales; };

template <class Type, bool wide = kWide<Type>>
struct ActivationsOf {
  using type = Activations32;
};
template <class Type>
struct ActivationsOf<Type, true> {
  using type = Activations256;
};
template <class Type>
using Activations = typename ActivationsOf<Type>::type;

template <class Type>
constexpr int kGroupSegments = Type::kLayout.group_segments();

struct Segment {
  const uint8_t *body, *tail;
};
template <class Type>
DEVICE Segment segment_of(const uint8_t* tile, int s, int segments) {
  constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
  constexpr int group = kGroupSegments<Type>;
  const int first = s & -group, count = segments - first < group ? segments - first : group;
  const uint8_t* bodies = tile + static_cast<size_t>(first) * (body_bytes + tail_bytes);
  return {bodies + (s - first) * body_bytes, bodies + count * body_bytes + (s - first) * tail_bytes};
}

// Returns quants less their offset as signed bytes. No byte borrows from another.
template <int offset>
DEVICE int32_t signed_bytes(Bytes b) {
  if (offset == 0) return static_cast<int32_t>(b);
  if (offset == 128) return static_cast<int32_t>(b ^ 0x80808080u);
  return static_cast<int32_t>(((b | 0x80808080u) - four_times(offset)) ^ 0x80808080u);
}

// Loads operand a of a warp for 32 columns, block i of a segment.
template <class Type>
DEVICE void load_weights(const uint8_t* body, int i, int lane, int32_t (&a)[4]) {
  const int row = lane / 4, c = lane % 4;
  UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < 2; r++) {
    const int j = kOf16<Type> ? 2 * i + half : i, group = kOf16<Type> ? c : c + 4 * half;
    a[2 * half + r] = signed_bytes<Type::kOffset>(Type::group({body, row + 8 * r}, j, group));
  }
}

// total += the products of 32 columns of a segment of 256, times the scales of the two rows, which have two sub-blocks
// or one. `one` says that there is a single row of activations (mma.cuh).
template <class Type>
DEVICE void add_products(const int32_t (&w)[4], uint2 q, const Scale (&scales)[2][2], int32_t (&total)[4],
                         bool one = false) {
  const int32_t b[2] = {static_cast<int32_t>(q.x), static_cast<int32_t>(q.y)};
  if constexpr (!kSubScaled<Type>) {
    multiply_k32(total, w, b, one);
  } else if constexpr (kOf16<Type>) {
    UNROLL for (int half = 0; half < 2; half++) {
      int32_t sums[4] = {0, 0, 0, 0};
      multiply_k16(sums, {w[2 * half], w[2 * half + 1]}, {b[half]}, one);
      UNROLL for (int n = 0; n < 4; n++) total[n] += sums[n] * scales[n / 2][half];
    }
  } else {
    int32_t sums[4] = {0, 0, 0, 0};
    multiply_k32(sums, w, b, one);
    UNROLL for (int n = 0; n < 4; n++) total[n] += sums[n] * scales[n / 2][0];
  }
}

// Scales of the two rows of weights for which a lane has results: rows lane / 4 and lane / 4 + 8.
struct RowPair {
  float scale[2], min[2];
};
template <class Type>
DEVICE RowPair row_scales(const uint8_t* tail, int lane) {
  RowPair r{};
  UNROLL for (int i = 0; i < 2; i++) {
    r.scale[i] = Type::scale({tail, lane / 4 + 8 * i});
    if constexpr (Type::kHasMin) r.min[i] = Type::min({tail, lane / 4 + 8 * i});
  }
  return r;
}

// Returns the mins of one row for the sums over 16 columns with numbers 4c to 4c + 3.
template <class Type>
DEVICE int32_t mins_of(Lines body, int c) {
  Bytes mins[Type::kSubBlocks / 4];
  Type::sub_mins(body, mins);
  if constexpr (kOf16<Type>)
    return static_cast<int32_t>(c < 2 ? (c == 0 ? mins[0] : mins[1]) : (c == 2 ? mins[2] : mins[3]));
  else
    return static_cast<int32_t>(__byte_perm(c < 2 ? mins[0] : mins[1], 0, c % 2 == 0 ? 0x1100 : 0x3322));
}

// Converts small sums, of 32 products of bytes or of mins, to floats. The low bits of a float from 1.5 * 2^23 on count
// integers, so a sum that starts with the bits of 1.5 * 2^23 ends as the bits of that plus the sum, if the sum is below
// 2^22. (Conversions are slower than additions.)
constexpr int32_t kFloatBegin = 0x4b400000;
constexpr float kBegin = 12582912.0f;
DEVICE float sum_as_float(int32_t sum) { return sub(__int_as_float(sum), kBegin); }

// Computes minus the sum of mins times sums of activations, over the sub-blocks of a segment.
DEVICE void minus_mins(const int32_t (&mins)[2], uint32_t high, uint32_t low, float (&out)[4], bool one = false) {
  int32_t highs[4] = {0, 0, 0, 0}, lows[4] = {kFloatBegin, kFloatBegin, kFloatBegin, kFloatBegin};
  multiply_k16(highs, mins, {static_cast<int32_t>(high)}, one);
  multiply_k16(lows, mins, {static_cast<int32_t>(low)}, one);
  UNROLL for (int n = 0; n < 4; n++) out[n] = sub(kBegin, __int_as_float(128 * highs[n] + lows[n]));
}

}  // namespace
}  // namespace llamaclust::cuda
