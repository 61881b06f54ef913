// Products of many rows by instructions of four warps (compute capability 9.0): a block has 64 rows of activations and a tile
// of sixteen rows of weights for each of its 4 to 16 warps, which multiply by fours.
//
// Such an instruction reads activations from shared memory by itself and adds in its own registers, so that a warp only
// decodes weights. Integer scales of sub-blocks are multiplied into the weights: as digits where a product with the whole
// scale is no byte, the highest first, and what is summed up is shifted before the next ones. Types whose weights leave no
// room for digits take the sums of each 32 columns and multiply these. Weights are copied to shared memory with the
// activations, a stage ahead.
#pragma once

#include "many_rows.cuh"

namespace llamaclust::cuda {
namespace {

// Sub-block scales as digits, of so many bits: weights times a digit are bytes. Unsigned ones are 0 to 2^bits - 1,
// signed ones from 1 - 2^(bits - 1) on.
template <class Type>
struct Digits {
  static constexpr int kCount = 0, kBits = 0;
  static constexpr bool kSigned = false;
};
template <int count, int bits, bool is_signed>
struct DigitsOf {
  static constexpr int kCount = count, kBits = bits;
  static constexpr bool kSigned = is_signed;
};

template <bool is_signed>
struct RegisterOf {
  using Type = int32_t;
};
template <>
struct RegisterOf<false> {
  using Type = uint32_t;
};

// Four weights times a digit, as bytes: signed ones are lifted by 128 meanwhile, so that none borrows from another.
template <class Type>
DEVICE uint32_t times_digit(Bytes weights, int32_t digit) {
  if constexpr (!Digits<Type>::kSigned) return weights * static_cast<uint32_t>(digit);
  const uint32_t lift = static_cast<uint32_t>(128 - Type::kOffset * digit) * 0x01010101u;
  return (weights * static_cast<uint32_t>(digit) + lift) ^ 0x80808080u;
}

template <class Type>
constexpr int kWeightBytes = kStageSegments<Type> * (Type::kLayout.body_bytes + Type::kLayout.tail_bytes);
// Of a row of a tile in shared memory: its scales, or their digits as bytes.
template <class Type>
constexpr int kRowWords = Digits<Type>::kCount > 0 ? Digits<Type>::kCount * Type::kSubBlocks / 4 : kScaleWords<Type>;

// Asks for `count` segments of a warp's tile. Where bodies of several stand before their tails, wide ones are put together.
template <class Type>
DEVICE void copy_weights(const uint8_t* tile, int first, int count, int segments, int lane, SharedAddress to) {
  constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
  if constexpr (kWide<Type>) {
    const Segment segment = segment_of<Type>(tile, first, segments);
    copy_bytes_async<body_bytes>(segment.body, to, body_bytes, lane);
    copy_bytes_async<tail_bytes>(segment.tail, to + body_bytes, tail_bytes, lane);
  } else {
    copy_bytes_async<kWeightBytes<Type>>(tile + static_cast<size_t>(first) * (body_bytes + tail_bytes), to,
                                         count * (body_bytes + tail_bytes), lane);
  }
}

// Bytes of four scales.
DEVICE uint32_t four_bytes(const Scale* scales) {
  return (scales[0] & 255) | (scales[1] & 255) << 8 | (scales[2] & 255) << 16 | static_cast<uint32_t>(scales[3]) << 24;
}

// Digits of a tile's scales, [digit, the lowest first][row][sub-block]; the highest is what is left.
template <class Type>
DEVICE void share_digits(const uint8_t* body, int lane, uint32_t* shared) {
  using D = Digits<Type>;
  constexpr int words = Type::kSubBlocks / 4;
  Scale scales[Type::kSubBlocks];
  Type::sub_scales({body, lane % 16}, scales);
  if (lane < 16) UNROLL for (int i = 0; i < words; i++) UNROLL for (int place = 0; place < D::kCount; place++) {
    Scale digits[4];
    UNROLL for (int n = 0; n < 4; n++) {
      constexpr int lift = D::kSigned ? (1 << (D::kBits - 1)) - 1 : 0, mask = (1 << D::kBits) - 1;
      Scale& scale = scales[4 * i + n];
      digits[n] = place + 1 == D::kCount ? scale : ((scale + lift) & mask) - lift;
      scale = (scale - digits[n]) >> D::kBits;
    }
    shared[(place * 16 + lane) * words + i] = four_bytes(digits);
  }
  __syncwarp();
}
// Those of rows lane / 4 and lane / 4 + 8.
template <class Type>
struct RowDigits {
  uint32_t words[2][Type::kSubBlocks / 4];
  DEVICE RowDigits(const uint32_t* shared, int place, int lane) {
    UNROLL for (int r = 0; r < 2; r++) UNROLL for (int i = 0; i < Type::kSubBlocks / 4; i++)
      words[r][i] = shared[(place * 16 + lane / 4 + 8 * r) * (Type::kSubBlocks / 4) + i];
  }
  DEVICE int32_t at(int r, int j) const {
    const uint32_t word = words[r][j / 4];
    if constexpr (Digits<Type>::kSigned) return static_cast<int8_t>(word >> j % 4 * 8);
    return static_cast<int32_t>(word >> j % 4 * 8 & 255);
  }
};

template <int groups>
using Sums = int32_t[4 * groups];

// The weights of 32 columns times a digit of their scales.
template <class Type, class Registers>
DEVICE void load_products(const uint8_t* body, const RowDigits<Type>& digits, int i, int lane, Registers (&a)[4]) {
  UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < 2; r++) {
    const int j = kOf16<Type> ? 2 * i + half : i, group = kOf16<Type> ? lane % 4 : lane % 4 + 4 * half;
    const Bytes weights = Type::group({body, lane / 4 + 8 * r}, j, group);
    a[2 * half + r] = static_cast<Registers>(times_digit<Type>(weights, digits.at(r, j)));
  }
}

// Sums of a segment of 256 columns with integer scales as digits.
template <class Type, int most>
DEVICE void sum_segment(const uint8_t* body, uint32_t* shared, SharedOperand b, int lane, Sums<most>& sums)
  requires(Digits<Type>::kCount > 0)
{
  share_digits<Type>(body, lane, shared);
  using Registers = typename RegisterOf<Digits<Type>::kSigned>::Type;
  NO_UNROLL for (int place = Digits<Type>::kCount - 1; place >= 0; place--) {
    const RowDigits<Type> digits(shared, place, lane);
    Registers a[2][2][4];
    UNROLL for (int pair = 0; pair < 4; pair++) {
      Registers(&now)[2][4] = a[pair % 2];
      if (pair >= 2) warpgroup_wait<1>();  // the registers are free again
      UNROLL for (int n = 0; n < 2; n++) load_products<Type>(body, digits, 2 * pair + n, lane, now[n]);
      warpgroup_begin();
      UNROLL for (int n = 0; n < 2; n++) {
        const int i = 2 * pair + n;
        multiply_k32_by_four(sums, now[n], b + i * static_cast<int>(sizeof(Quants)), i > 0 || place < Digits<Type>::kCount - 1);
      }
      warpgroup_commit();
    }
    warpgroup_wait<0>();
    if (place > 0) UNROLL for (int& sum : sums) sum *= 1 << Digits<Type>::kBits;
  }
}

// The same without integer scales.
template <class Type, int most>
DEVICE void sum_segment(const uint8_t* body, uint32_t*, SharedOperand b, int lane, Sums<most>& sums)
  requires(!kSubScaled<Type>)
{
  int32_t a[2][2][4];
  UNROLL for (int pair = 0; pair < 4; pair++) {
    if (pair >= 2) warpgroup_wait<1>();
    UNROLL for (int n = 0; n < 2; n++) load_weights<Type>(body, 2 * pair + n, lane, a[pair % 2][n]);
    warpgroup_begin();
    UNROLL for (int n = 0; n < 2; n++)
      multiply_k32_by_four(sums, a[pair % 2][n], b + (2 * pair + n) * static_cast<int>(sizeof(Quants)), pair + n > 0);
    warpgroup_commit();
  }
  warpgroup_wait<0>();
}

// The same where scales are multiplied with the sums of their sub-blocks: of sixteen columns, with zeros for the others.
template <class Type, int most>
DEVICE void sum_segment(const uint8_t* body, uint32_t* shared, SharedOperand b, int lane, Sums<most>& sums)
  requires(kSubScaled<Type> && Digits<Type>::kCount == 0)
{
  share_scales<Type>(body, lane, shared);
  UNROLL for (int& sum : sums) sum = 0;
  NO_UNROLL for (int i = 0; i < 8; i++) {
    int32_t a[4];
    Scale scales[2][2];
    load_weights<Type>(body, i, lane, a);
    read_scales<Type>(shared, i, lane, scales);
    UNROLL for (int half = 0; half < (kOf16<Type> ? 2 : 1); half++) {
      int32_t part[4] = {a[0], a[1], a[2], a[3]};
      if constexpr (kOf16<Type>) part[2 - 2 * half] = part[3 - 2 * half] = 0;
      Sums<most> products;
      warpgroup_begin();
      multiply_k32_by_four(products, part, b + i * static_cast<int>(sizeof(Quants)), 0);
      warpgroup_commit();
      warpgroup_wait<0>();
      UNROLL for (int n = 0; n < 4 * most; n++)
        sums[n] += products[n] * scales[n % 4 / 2][half];
    }
  }
}

template <class Type, int most>
DEVICE void add_stage(const uint8_t* weights, int, int groups, const Stage<Type, most>& stage, uint32_t* shared_scales, int lane,
                      Totals<most>& totals)
  requires(kWide<Type>)
{
  __syncwarp();  // scales of the segment before are read
  const Segment segment = {weights, weights + Type::kLayout.body_bytes};
  Sums<most> sums;
  sum_segment<Type, most>(segment.body, shared_scales, shared_operand(&stage[0][0].q[0], sizeof stage[0]), lane, sums);
  add_sums<Type, most>(segment, groups, stage, lane, reinterpret_cast<const int32_t(&)[most][4]>(sums), totals);
}

template <class Type, int most>
DEVICE void add_stage(const uint8_t* weights, int count, int groups, const Stage<Type, most>& stage, uint32_t*, int lane,
                      Totals<most>& totals)
  requires(!kWide<Type>)
{
  NO_UNROLL for (int s = 0; s < count; s++) {
    const Segment segment = segment_of<Type>(weights, s, count);
    int32_t a[4];
    load_weights<Type>(segment.body, 0, lane, a);
    Sums<most> sums;
    warpgroup_begin();
    multiply_k32_by_four(sums, a, shared_operand(&stage[0][s].q, sizeof stage[0]), 0);
    warpgroup_commit();
    const RowPair rows = row_scales<Type>(segment.tail, lane);
    warpgroup_wait<0>();
    UNROLL for (int begin = 0; begin < most; begin += kGroupsTogether<Type>) if (begin < groups)
      UNROLL for (int g = begin; g < begin + kGroupsTogether<Type>; g++) UNROLL for (int n = 0; n < 4; n++) {
        const Activations32& of = stage[g][s];
        const int place = 2 * (lane % 4) + n % 2;
        float& total = totals[g][n];
        total = fma(mul(rows.scale[n / 2], of.scale[place]), __int2float_rn(sums[4 * g + n]), total);
        if constexpr (Type::kHasMin) total = fma(rows.min[n / 2], of.scaled_sum[place], total);
      }
  }
}

// Grid: (groups of `rows` rows or items, for each matrix tiles / warps rounded up), so that what reads the same weights runs
// at the same time; blocks of 128, 256 or, of 64 rows, 512 threads. Shared memory: two stages of activations, two of weights and the scales
// of each warp.
template <class Type, int rows>
DEVICE void gemm(const Products& all) {
  constexpr int most = rows / kGroupRows;
  SHARED(int32_t, of_row, [rows]);
  const Product p = product_of(all, blockDim.x / kWarp, blockIdx.y);
  const Share share = share_of(p, blockIdx.x, rows);
  if (share.n <= 0) return;
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (thread < rows) of_row[thread] = activation_row(p, share, thread);
  __syncthreads();
  auto* stages = reinterpret_cast<Stage<Type, most>*>(DYNAMIC_SHARED);
  uint8_t* copies = reinterpret_cast<uint8_t*>(stages + 2) + warp * 2 * kWeightBytes<Type>;
  uint32_t* scales = reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(stages + 2) + warps * 2 * kWeightBytes<Type>) +
                     warp * 16 * kRowWords<Type>;
  const int segments = p.cols / Type::kLayout.segment_cols, groups = (share.n + 7) / 8;
  const int tile = p.block * warps + warp, last_tile = p.matrix().tile_count() - 1;  // past the last: thrown away
  const uint8_t* weights = tile_of(p, share, tile < last_tile ? tile : last_tile);
  constexpr int at_once = kStageSegments<Type>;
  const auto request = [&](int first, int to) {
    const int count = segments - first < at_once ? segments - first : at_once;
    copy_weights<Type>(weights, first, count, segments, lane, shared_address(copies + to * kWeightBytes<Type>));
    copy_stage<Type, most>(p, share, of_row, groups, first, count, stages[to]);
    return count;
  };
  Totals<most> totals = {};
  int count = request(0, 0);
  for (int first = 0, at = 0; first < segments; first += at_once, at ^= 1) {
    const int now = count;
    copy_async_wait<0>();
    publish_shared();
    __syncthreads();  // and the other stage is read
    if (first + at_once < segments) count = request(first + at_once, at ^ 1);
    add_stage<Type, most>(copies + at * kWeightBytes<Type>, now, groups, stages[at], scales, lane, totals);
  }
  if (tile <= last_tile) store_totals(p, share, result_of(p, share), tile, lane, totals);
}

}  // namespace
}  // namespace llamaclust::cuda
