// The order of operations of every product with quantized weights (docs/internals/numerics.md). Within a segment, sums
// are exact integers. Segments are added in the order of k: total = fma(scale_w * scale_a, sum, total), with a second
// fma for types with a min.
#pragma once

#include <type_traits>

#include "level/matmul/product.h"
#include "level/quants/decoder.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <class Type>
constexpr bool kWide = Type::kLayout.segment_cols == 256;

template <class Type>
using Activation = std::conditional_t<Type::kLayout.activation == ActivationFormat::F32, float,
                                      std::conditional_t<kWide<Type>, Q8_256, Q8_32>>;

template <class Type>
constexpr int kGroups = Type::kLayout.segment_cols / Type::kSubBlocks / 4;  // Number of k-groups in a sub-block.

// No sum of a segment overflows: it has 256 products of a quant, an activation and a sub-block scale, of eight bits
// each.
static_assert(256LL * 255 * 127 * 128 < 1LL << 31);

// Number of sub-blocks that share lines of a body. Loops over tiles compute that many at a time, so that the index
// within them is a compile-time constant.
template <class Type>
constexpr int kTogether = 1;
template <class Type>
  requires requires { Type::kTogether; }
constexpr int kTogether<Type> = Type::kTogether;

// True if sub-blocks have integer scales.
template <class Type>
constexpr bool kSubScaled = requires { Type::sub_scales; };

// True if sub-blocks have integer mins. They serve either the type's float min, or its offset. In the second case, the
// offset is subtracted once per segment, as mins times sums of activations, which costs less than subtracting it in
// each sub-block.
template <class Type>
constexpr bool kSubMins = requires { Type::sub_mins; };
template <class Type>
constexpr bool kOffsetInMins = kSubMins<Type> && !Type::kHasMin;

// Number of lines of mins, each with those of four sub-blocks. If there are more than sub-blocks need, the additional
// ones start with the first sub-block again.
template <class Type>
constexpr int kMinLines = Type::kSubBlocks / 4;
template <class Type>
  requires requires { Type::kMinLines; }
constexpr int kMinLines<Type> = Type::kMinLines;

// A type that stores bit pairs of four sub-blocks in a byte (`pairs`). The pairs are masked but not shifted, so the
// sums of sub-block j are 4^(j % 4) times too large. The scales of the other sub-blocks are multiplied to match, and
// the total is divided by 64.
template <class Type>
struct InPlace : Type {
  static constexpr bool kScaledUp = true;
  static DECODE Bytes group(Lines body, int j, int g) {
    constexpr Places places{{0, 0, 0, 0}, {3, 12, 48, 192}};
    return field_of<places>(Type::pairs(body, j, g), j % 4);
  }
};
template <class Type>
constexpr bool kScaledUp = requires { Type::kScaledUp; };
DECODE I32x16 scaled_up(I32x16 x, int j) {
  switch (j % 4) {
    case 0: return shift_left<6>(x);
    case 1: return shift_left<4>(x);
    case 2: return shift_left<2>(x);
    default: return x;
  }
}

// Values that a decoder prepares once per segment, for any number of tokens.
template <class Type, bool has = kSubScaled<Type>>
struct SubScales {
  DECODE explicit SubScales(const uint8_t*) {}
};
template <class Type>
struct SubScales<Type, true> {
  Scale scales[Type::kSubBlocks];
  DECODE explicit SubScales(const uint8_t* body) {
    Type::sub_scales(body, scales);
    if constexpr (kScaledUp<Type>) UNROLL for (int j = 0; j < Type::kSubBlocks; j++) scales[j] = scaled_up(scales[j], j);
  }
};
template <class Type, bool has = kSubMins<Type>>
struct SubMins {
  DECODE explicit SubMins(const uint8_t*) {}
};
template <class Type>
struct SubMins<Type, true> {
  Bytes mins[kMinLines<Type>];
  DECODE explicit SubMins(const uint8_t* body) { Type::sub_mins(body, mins); }
};

// The operand from which k-groups are decoded: the body itself, or a type's own form of it.
template <class Type>
struct BodyOf {
  using Body = const uint8_t*;
};
template <class Type>
  requires requires { typename Type::Body; }
struct BodyOf<Type> {
  using Body = typename Type::Body;
};

// Prefetches a line at the distance of the prefetching kind from a line that is being read. R streams are read
// together, so the distance is divided by R.
template <Prefetch way, int R = 1>
DECODE void prefetch_behind(const uint8_t* line) {
  constexpr int bytes = way == Prefetch::Far ? 20480 : 6144;
  __builtin_prefetch(line + bytes / R, 0, way == Prefetch::Far ? 2 : 0);
}

// True if the hardware prefetcher follows the reads of one token better than Prefetch::Far. It can if every load of the
// loop is an instruction of its own and advances by the same distance from segment to segment. Measured shares of the
// read bandwidth, with software prefetches and without: on Zen 4 (AVX-512, unrolled) 0.85 and 0.93 for Q4_K, 0.77 and
// 0.96 for Q5_K; with four tokens 0.87 and 0.58; for Q6_K, whose tails are adjacent, 0.77 and 0.45; on Zen 3 (AVX2, not
// unrolled) 1.00 and 0.72 for Q4_K, 0.96 and 0.71 for Q5_K.
template <class Type, int T>
constexpr bool kFollowed = kUnrollsSegments && T == 1 && Type::kLayout.tail_bytes == 64 && kTogether<Type> == 1;

// A segment of a tile, decoded while it is read.
template <class Type, Prefetch way = Prefetch::Far>
struct TileSegment {
  static constexpr bool kDecoded = false;
  static constexpr bool kMayUnroll = way == Prefetch::Far;  // Unrolling serves the hardware prefetcher.
  template <int T>
  static constexpr bool kPrefetches = way == Prefetch::Near || !kFollowed<Type, T>;
  static constexpr bool kSigned = false;  // Whether the bytes of a group are signed, without an offset.
  const uint8_t *body, *tail;
  typename BodyOf<Type>::Body groups;
  SubScales<Type> sub_scales;
  SubMins<Type> sub_mins;
  DECODE TileSegment(const uint8_t* body_, const uint8_t* tail_)
      : body(body_), tail(tail_), groups(body_), sub_scales(body_), sub_mins(body_) {}
  DECODE Bytes group(int j, int g) const { return Type::group(groups, j, g); }
  DECODE Scale sub_scale(int j) const { return sub_scales.scales[j]; }
  DECODE Bytes mins(int i) const { return sub_mins.mins[i]; }
  DECODE F32x16 scale() const { return Type::scale(tail); }
  DECODE F32x16 min() const { return Type::min(tail); }
  // Prefetches sub-block j's share of the lines ahead. Prefetching all lines at once would fill the queue of cache
  // misses and stall the arithmetic.
  DECODE void prefetch(int j) const {
    constexpr int lines = (Type::kLayout.body_bytes + Type::kLayout.tail_bytes + 63) / 64;
    constexpr int share = (lines + Type::kSubBlocks - 1) / Type::kSubBlocks;
    UNROLL for (int i = 0; i < share; i++) prefetch_behind<way>(body + 64 * (j * share + i));
  }
};

DECODE int32_t load_four(const int8_t* p) {
  int32_t r;
  memcpy(&r, p, 4);
  return r;
}

// Returns the sum of the activations that sub-block j multiplies.
template <class Type>
DECODE int32_t sub_sum(const Q8_256& a, int j) {
  return Type::kSubBlocks == 16 ? a.sums[j] : a.sums[2 * j] + a.sums[2 * j + 1];
}

// Returns the sum of all activations of a segment.
DECODE int32_t sum_of(const Q8_256& a) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += a.sums[i];
  return sum;
}

// Returns minus the sum that the offset of the quants adds to sub-block j.
template <class Type>
DECODE I32x16 minus_offset(const Q8_32& a, int) {
  return sub(broadcast(0), mul(broadcast(a.sum), broadcast(Type::kOffset)));
}
template <class Type>
DECODE I32x16 minus_offset(const Q8_256& a, int j) {
  const int32_t* sums = a.sums + (Type::kSubBlocks == 16 ? j : 2 * j);
  const I32x16 sum = Type::kSubBlocks == 16 ? broadcast(sums[0]) : add(broadcast(sums[0]), broadcast(sums[1]));
  return sub(broadcast(0), mul(sum, broadcast(Type::kOffset)));
}

// True if sums start with minus_offset(), so that it need not be added later.
template <class Type>
constexpr bool kOffsetFirst =
    kSumsFrom && Type::kOffset != 0 && !kOffsetInMins<Type> && (!kWide<Type> || kSubScaled<Type>);

// Adds sub-block j to total, before the segment's float scale.
template <class Type, class Segment, class Activations, int R, int T>
DECODE void add_sub_block(const Segment (&w)[R], const Activations* const (&a)[T], int j, I32x16 (&total)[R][T]) {
  constexpr int bits = Type::kBits, groups = kGroups<Type>;
  constexpr int chunk = groups < kGroupsPerSum<bits> ? groups : kGroupsPerSum<bits>;
  constexpr int offset = kCentred<bits> || kOffsetFirst<Type> || kOffsetInMins<Type> ? 0 : Type::kOffset;
  static_assert(!kOffsetFirst<Type> || chunk == groups);
  // On some levels, half of the sum that the offset adds goes through 16 bits; on those, eight-bit bytes are centred.
  static_assert(!kWide<Type> || bits == 8 || offset * 127 * (4 * groups) / 2 < 32768);
  if constexpr (Segment::template kPrefetches<T>) UNROLL for (int r = 0; r < R; r++) w[r].prefetch(j);
  UNROLL for (int first = 0; first < groups; first += chunk) {
    Sums sums[R][T];
    UNROLL for (int t = 0; t < T; t++) {
      Sums from = no_sums();
      if constexpr (kOffsetFirst<Type>) from = sums_from(minus_offset<Type>(*a[t], j));
      UNROLL for (int r = 0; r < R; r++) sums[r][t] = from;
    }
    UNROLL for (int g = first; g < first + chunk; g++) {
      Bytes group[R];
      UNROLL for (int r = 0; r < R; r++) group[r] = w[r].group(j, g);
      UNROLL for (int t = 0; t < T; t++) {
        const int32_t four = load_four(a[t]->q + 4 * (j * groups + g));
        UNROLL for (int r = 0; r < R; r++) sums[r][t] = step<bits>(sums[r][t], group[r], four);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) {
      if constexpr (!kSubScaled<Type> && kScaledUp<Type>)
        total[r][t] = add(total[r][t], scaled_up(sums[r][t], j));
      else if constexpr (!kSubScaled<Type>)
        total[r][t] = add_sums(total[r][t], sums[r][t]);
      else if (offset != 0 && first + chunk == groups)
        total[r][t] = add_scaled(total[r][t], sums[r][t], offset * sub_sum<Type>(*a[t], j), w[r].sub_scale(j));
      else
        total[r][t] = add_scaled(total[r][t], sums[r][t], w[r].sub_scale(j));
    }
  }
}

// Returns the sum over sub-blocks of min times the sum of its activations. That sum is 128 * high + low, and each part
// is an exact dot product.
template <class Type, class Segment>
DECODE I32x16 sum_of_mins(const Segment& w, const Q8_256& a) {
  constexpr bool of_16 = Type::kSubBlocks == 16;
  const int8_t *sums_high = of_16 ? a.sums_16_high : a.sums_high, *sums_low = of_16 ? a.sums_16_low : a.sums_low;
  I32x16 high = broadcast(0), low = broadcast(0);
  UNROLL for (int i = 0; i < kMinLines<Type>; i++) {
    const int first = 4 * i % Type::kSubBlocks;
    high = add_sums(high, step<6>(no_sums(), w.mins(i), load_four(sums_high + first)));
    low = add_sums(low, step<6>(no_sums(), w.mins(i), load_four(sums_low + first)));
  }
  return add(shift_left<7>(high), low);
}

// True if the sums of a segment of 32 columns still contain the offset.
template <class Type, class Segment>
constexpr bool kOffsetLeft =
    Type::kOffset != 0 && !kCentred<Type::kBits> && !kOffsetFirst<Type> && !Segment::kSigned;

// Adds a segment to the outputs. `total` has the sums of its sub-blocks.
template <class Type, class Segment, int R, int T>
DECODE void add_total(const Segment (&w)[R], const Activation<Type>* const (&a)[T], I32x16 (&total)[R][T],
                      F32x16 (&acc)[R][T]) {
  UNROLL for (int t = 0; t < T; t++) {
    const F32x16 scale = broadcast(a[t]->scale);
    UNROLL for (int r = 0; r < R; r++) {
      if constexpr (kScaledUp<Type>) total[r][t] = divide_by_power<6>(total[r][t]);
      if constexpr (!kWide<Type> && kOffsetLeft<Type, Segment>)
        total[r][t] = add(total[r][t], minus_offset<Type>(*a[t], 0));
      if constexpr (kWide<Type> && !kSubScaled<Type> && !Segment::kSigned)
        total[r][t] = sub(total[r][t], broadcast(Type::kOffset * sum_of(*a[t])));
      if constexpr (kOffsetInMins<Type>)
        total[r][t] = sub(total[r][t], mul(sum_of_mins<Type>(w[r], *a[t]), broadcast(Type::kOffset)));
      acc[r][t] = fma(mul(w[r].scale(), scale), to_float(total[r][t]), acc[r][t]);
      if constexpr (kWide<Type> && Type::kHasMin) {
        const I32x16 mins = sub(broadcast(0), sum_of_mins<Type>(w[r], *a[t]));
        acc[r][t] = fma(mul(w[r].min(), scale), to_float(mins), acc[r][t]);
      } else if constexpr (Type::kHasMin) {
        acc[r][t] = fma(w[r].min(), broadcast(a[t]->scaled_sum), acc[r][t]);
      }
    }
  }
}

template <class Type, class Segment, int R, int T>
DECODE void add_segment(const Segment (&w)[R], const Activation<Type>* const (&a)[T], F32x16 (&acc)[R][T]) {
  I32x16 total[R][T];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int t = 0; t < T; t++) total[r][t] = broadcast(0);
  // On a Zen 5, the loop for one token of Q4_K reaches 1.0 of the bandwidth with Prefetch::Near, but 0.78 if it is
  // unrolled.
  if constexpr (kUnrollsSegments && Segment::kMayUnroll && R * T == 1) {
    UNROLL for (int j = 0; j < Type::kSubBlocks; j++) add_sub_block<Type>(w, a, j, total);
  } else {
    // Decoded k-groups share no lines, so one sub-block at a time needs less code.
    constexpr int together = Segment::kDecoded && !kScaledUp<Type> ? 1 : kTogether<Type>;
#pragma GCC unroll 1
    for (int j = 0; j < Type::kSubBlocks; j += together)
      UNROLL for (int i = 0; i < together; i++) add_sub_block<Type>(w, a, j + i, total);
  }
  add_total<Type>(w, a, total, acc);
}

// Returns the activations of a token. Tokens beyond the end repeat the last one, and their results are discarded.
template <class Type>
DECODE const Activation<Type>* token_activations(const Product& p, int token, int tokens) {
  const size_t line = line_of(p.activation_lines, token < tokens ? token : tokens - 1);
  return reinterpret_cast<const Activation<Type>*>(p.activations + line * p.activation_stride);
}

template <class Type, Prefetch way = Prefetch::Far>
DECODE TileSegment<Type, way> segment_of(const uint8_t* tile, int s, int segments) {
  constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
  constexpr int group = Type::kLayout.group_segments();
  const int first = s / group * group, count = segments - first < group ? segments - first : group;
  const uint8_t* bodies = tile + static_cast<size_t>(first) * (body_bytes + tail_bytes);
  return {bodies + (s - first) * body_bytes, bodies + count * body_bytes + (s - first) * tail_bytes};
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
