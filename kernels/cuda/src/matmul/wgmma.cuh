// Products of many rows with instructions of four warps (compute capability 9.0). A block has 64 or 128 rows of
// activations, and a tile of sixteen rows of weights for each of its 4 to 16 warps, which multiply in groups of four.
//
// Such an instruction reads activations from shared memory and adds in its own registers, so a warp only decodes
// weights. Integer scales of sub-blocks are multiplied into the weights. If these products do not fit into a byte, they
// are divided into two digits: weights times two digits of the scale, or the two bytes of each product. Each digit has
// its own sums, which are combined after a segment.
#pragma once

#include "stages.cuh"

namespace llamaclust::cuda {
namespace {

// With 128 rows and 8 warps, the groups of four warps multiply alternately; otherwise their order is not controlled.
constexpr bool kInTurn = true;
// Operands of a warp, each of 64 columns, or of both digits of 32: some are decoded while others are multiplied.
constexpr int kOperands = 3;

// Bits of scales if weights times the scales, or times three-bit digits of them, fit into bytes; 0 for other types.
template <class Type>
constexpr int kScaleBits = 0;
template <class Type>
constexpr int kDigits = kSubScaled<Type> && kScaleBits<Type> != 4 ? 2 : 1;
template <class Type>
constexpr int kDigitBits = kScaleBits<Type> == 0 ? 8 : 3;
// Bytes of a warp for the scales that its lanes share.
template <class Type>
constexpr int kScratchBytes = kScaleBits<Type> == 0 ? 16 * 4 * kScaleWords<Type> : 0;

// Registers of 32 columns, four for each digit, the lowest digit first.
template <class Type>
using Operand = uint32_t[kDigits<Type>][4];
template <int groups>
using Sums = int32_t[4 * groups];

// Splits the products of four weights (less the offset) and their scale into bytes, of which the lower ones are
// unsigned. An offset is added meanwhile, so that no product borrows from another.
template <int offset>
DEVICE void split_products(Bytes weights, Scale scale, uint32_t& low, uint32_t& high) {
  const uint32_t by = static_cast<uint32_t>(scale), lift = 0x80008000u - offset * 0x10001u * by;
  const uint32_t even = (weights & 0x00ff00ffu) * by + lift, odd = (weights >> 8 & 0x00ff00ffu) * by + lift;
  low = __byte_perm(even, odd, 0x6240);
  high = __byte_perm(even, odd, 0x7351) ^ 0x80808080u;
}

// Decodes a warp's operands of a segment, of 32 columns each.
template <class Type>
class Operands {
 public:
  DEVICE Operands(const uint8_t* body, uint32_t* shared, int lane) : body_(body), shared_(shared), lane_(lane) {
    share_scales<Type>(body, lane, shared);
  }
  DEVICE void load(int i, Operand<Type>& a) const
    requires(!kSubScaled<Type>)
  {
    load_weights<Type>(body_, i, lane_, reinterpret_cast<int32_t(&)[4]>(a[0]));
  }
  DEVICE void load(int i, Operand<Type>& a) const
    requires(kSubScaled<Type>)
  {
    Scale scales[2][2];
    read_scales<Type>(shared_, i, lane_, scales);
    UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < 2; r++) {
      const int j = kOf16<Type> ? 2 * i + half : i, group = kOf16<Type> ? lane_ % 4 : lane_ % 4 + 4 * half;
      split_products<Type::kOffset>(Type::group({body_, lane_ / 4 + 8 * r}, j, group), scales[r][kOf16<Type> ? half : 0],
                                    a[0][2 * half + r], a[1][2 * half + r]);
    }
  }

 private:
  const uint8_t* body_;
  const uint32_t* shared_;
  int lane_;
};
// The variant with digits of scales, for rows lane / 4 and lane / 4 + 8.
template <class Type>
  requires(kScaleBits<Type> > 0)
class Operands<Type> {
 public:
  DEVICE Operands(const uint8_t* body, uint32_t*, int lane) : body_(body), lane_(lane) {
    UNROLL for (int r = 0; r < 2; r++) UNROLL for (int i = 0; i < kWords; i++) {
      const Bytes scales = Type::scale_bytes({body, lane / 4 + 8 * r}, i);
      UNROLL for (int digit = 0; digit < kDigits<Type>; digit++)
        digits_[digit][r][i] = kDigits<Type> == 1 ? scales : scales >> 3 * digit & 0x07070707u;
    }
  }
  DEVICE void load(int i, Operand<Type>& a) const {
    UNROLL for (int half = 0; half < 2; half++) UNROLL for (int r = 0; r < 2; r++) {
      const int j = kOf16<Type> ? 2 * i + half : i, group = kOf16<Type> ? lane_ % 4 : lane_ % 4 + 4 * half;
      const Bytes weights = Type::group({body_, lane_ / 4 + 8 * r}, j, group);
      UNROLL for (int digit = 0; digit < kDigits<Type>; digit++)
        a[digit][2 * half + r] = weights * __byte_perm(digits_[digit][r][j / 4], 0, 0x4440 | j % 4);
    }
  }

 private:
  static constexpr int kWords = Type::kSubBlocks / 4;
  const uint8_t* body_;
  int lane_;
  uint32_t digits_[kDigits<Type>][2][kWords];
};

// Multiplies 32 columns of a digit: sums = the products, or sums += the products if `adds`.
template <class Type, int digit, class Sums>
DEVICE void multiply_digit(Sums& sums, const Operand<Type>& a, SharedOperand b, int adds) {
  if constexpr (kScaleBits<Type> == 0 && digit + 1 == kDigits<Type>)
    multiply_k32_by_four(sums, reinterpret_cast<const int32_t(&)[4]>(a[digit]), b, adds);
  else
    multiply_k32_by_four(sums, a[digit], b, adds);
}

struct ScaledSum {
  float scale, sum;
};
// Adds terms to half of the totals, starting with group `first`.
template <class Type, int most, class Terms>
DEVICE void add_scaled(int first, int groups, Totals<most>& totals, Terms terms) {
  UNROLL for (int begin = first; begin < first + most / 2; begin += 4) if (begin < groups)
    UNROLL for (int g = begin; g < begin + 4; g++) UNROLL for (int n = 0; n < 4; n++) {
      const ScaledSum term = terms(g, n);
      totals[g][n] = fma(term.scale, term.sum, totals[g][n]);
    }
}

// Computes the sums of a segment of 256 columns, in this group's turn.
template <class Type, int most, class Turn>
DEVICE void sum_segment(const Operands<Type>& operands, SharedOperand b, const Turn& turn,
                        Sums<most>* sums) {
  constexpr int together = 2 / kDigits<Type>;
  Operand<Type> a[kOperands][together];
  UNROLL for (int step = 0; step < 8 / together; step++) {
    auto& now = a[step % kOperands];
    if (step >= kOperands) warpgroup_wait<kOperands - 1>();  // The registers are free again.
    UNROLL for (int n = 0; n < together; n++) operands.load(step * together + n, now[n]);
    if (step == 0) turn.begin();
    warpgroup_begin();
    UNROLL for (int n = 0; n < together; n++) {
      const int i = step * together + n;
      const SharedOperand columns = b + i * static_cast<int>(sizeof(Quants));
      multiply_digit<Type, 0>(sums[0], now[n], columns, i > 0);
      if constexpr (kDigits<Type> == 2) multiply_digit<Type, 1>(sums[1], now[n], columns, i > 0);
    }
    warpgroup_commit();
  }
  turn.end();
  warpgroup_wait<0>();
  if constexpr (kDigits<Type> == 2)
    UNROLL for (int n = 0; n < 4 * most; n++) sums[0][n] += sums[1][n] * (1 << kDigitBits<Type>);
}

template <class Type, int most, class Turn>
DEVICE void add_stage(const uint8_t* weights, int, int groups, const Stage<Type, most>& stage, uint32_t* shared, int lane,
                      const Turn& turn, Totals<most>& totals)
  requires(kWide<Type>)
{
  Sums<most> sums[Type::kHasMin ? 2 : kDigits<Type>];
  sum_segment<Type, most>(Operands<Type>(weights, shared, lane), shared_operand(&stage[0][0].q[0], sizeof stage[0]), turn,
                          sums);
  const RowPair rows = row_scales<Type>(weights + Type::kLayout.body_bytes, lane);
  const auto scale = [&](int g, int n) { return stage[g][0].scale[2 * (lane % 4) + n % 2]; };
  const auto add_sums = [&](int first) {
    add_scaled<Type, most>(first, groups, totals, [&](int g, int n) {
      return ScaledSum{mul(rows.scale[n / 2], scale(g, n)), __int2float_rn(sums[0][4 * g + n])};
    });
  };
  if constexpr (!Type::kHasMin) {
    add_sums(0);
    add_sums(most / 2);
  } else {
    // Multiplies mins with sums of activations, in two digits, in registers that the sums no longer need.
    Sums<most>& products = sums[1];
    const SharedOperand digits = shared_operand(stage[0][0].high, sizeof stage[0]);
    int32_t high[4] = {}, low[4] = {};
    UNROLL for (int r = 0; r < 2; r++) high[r] = low[2 + r] = mins_of<Type>({weights, lane / 4 + 8 * r}, lane % 4);
    warpgroup_begin();
    multiply_k32_by_four(products, high, digits, 0);
    warpgroup_commit();
    add_sums(0);
    warpgroup_wait<0>();
    UNROLL for (int32_t& one : products) one = 128 * one + kFloatBegin;
    warpgroup_begin();
    multiply_k32_by_four(products, low, digits, 1);
    warpgroup_commit();
    add_sums(most / 2);
    warpgroup_wait<0>();
    UNROLL for (int first = 0; first < most; first += most / 2) add_scaled<Type, most>(first, groups, totals, [&](int g, int n) {
      return ScaledSum{mul(rows.min[n / 2], scale(g, n)), sub(kBegin, __int_as_float(products[4 * g + n]))};
    });
  }
}

// Adds segments of 32 columns. One is multiplied while the sums of the previous one are added; missing ones are
// computed in vain.
template <class Type, int most, class Turn>
DEVICE void add_stage(const uint8_t* weights, int count, int groups, const Stage<Type, most>& stage, uint32_t*, int lane,
                      const Turn&, Totals<most>& totals)
  requires(!kWide<Type>)
{
  int32_t a[2][4];
  Sums<most> sums[2];
  const auto multiply = [&](int s) {
    load_weights<Type>(segment_of<Type>(weights, s, count).body, 0, lane, a[s % 2]);
    warpgroup_begin();
    multiply_k32_by_four(sums[s % 2], a[s % 2], shared_operand(&stage[0][s].q, sizeof stage[0]), 0);
    warpgroup_commit();
  };
  multiply(0);
  UNROLL for (int s = 0; s < kStageBlocks; s++) {
    if (s + 1 < kStageBlocks) {
      multiply(s + 1);
      warpgroup_wait<1>();
    } else {
      warpgroup_wait<0>();
    }
    if (s >= count) continue;
    const RowPair rows = row_scales<Type>(segment_of<Type>(weights, s, count).tail, lane);
    UNROLL for (int begin = 0; begin < most; begin += kGroupsTogether<Type>) if (begin < groups)
      UNROLL for (int g = begin; g < begin + kGroupsTogether<Type>; g++) UNROLL for (int n = 0; n < 4; n++) {
        const Activations32& of = stage[g][s];
        const int place = 2 * (lane % 4) + n % 2;
        float& total = totals[g][n];
        total = fma(mul(rows.scale[n / 2], of.scale[place]), __int2float_rn(sums[s % 2][4 * g + n]), total);
        if constexpr (Type::kHasMin) total = fma(rows.min[n / 2], of.scaled_sum[place], total);
      }
  }
}

template <class Type, int rows>
using TurnOf = Choice<kInTurn && kWide<Type> && rows == 128, Alternation, NoAlternation>;

// Grid: (groups of `rows` rows, or items; tiles / warps rounded up for each matrix), so that blocks that read the same
// weights run at the same time. Blocks of 128, 256 or (with 64 rows) 512 threads. Shared memory: two or three stages,
// and the scales of each warp.
template <class Type, int rows>
DEVICE void gemm(const Products& all) {
  constexpr int most = rows / kGroupRows, at_once = kStageSegments<Type>;
  using AllStages = Stages<Type, most, kScratchBytes<Type>>;
  SHARED(BlockState<most>, state, [1]);
  const int thread = threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Share share = share_of(all, blockIdx.x, rows);
  if (share.n <= 0) return;
  {
    const Product p = product_of(all, AllStages::warps(), blockIdx.y);
    if (thread < rows) state[0].of_row[thread] = activation_row(p, share, thread);
    if (thread == 0) state[0].share = share, state[0].which = p.which, state[0].block = p.block;
  }
  __syncthreads();
  AllStages stages(all, state[0]);
  auto* scales = reinterpret_cast<uint32_t*>(AllStages::scratch_memory());
  const TurnOf<Type, rows> turn(warp / 4);
  Totals<most> totals = {};
  const int segments = all.cols / Type::kLayout.segment_cols, groups = groups_of(share);
  for (int first = 0; first < segments; first += at_once) {
    const int left = segments - first;
    stages.take();
    add_stage<Type, most>(stages.weights(), left < at_once ? left : at_once, groups, stages.activations(), scales, lane, turn,
                          totals);
    stages.release(first);
  }
  turn.finish();
  const Product p = state[0].product(all);
  const int tile = p.block * AllStages::warps() + warp;
  if (tile < p.matrix().tile_count()) store_totals(p, state[0].share, result_of(p, state[0].share), tile, lane, totals);
}

}  // namespace
}  // namespace llamaclust::cuda
