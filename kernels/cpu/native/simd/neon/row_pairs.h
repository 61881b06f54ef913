// Products of two rows with two tokens in eight columns, by one instruction (smmla).
#pragma once

#include "simd/dot.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Sums of sixteen rows with two tokens. v[i] has rows 2i and 2i + 1, each with both tokens.
struct BlockSums {
  int32x4_t v[8];
};
#define EACH_ROW_PAIR(expression)                                                          \
  const auto pair = [&](int i) __attribute__((always_inline)) { return expression; }; \
  return BlockSums{{pair(0), pair(1), pair(2), pair(3), pair(4), pair(5), pair(6), pair(7)}}

// Sixteen columns of two tokens. v[i] has columns 8i to 8i + 7 of both.
struct TokenPairs {
  int8x16_t v[2];
};

// Rearranges two k-groups: `first` becomes rows 0 to 7 of the eight columns, `second` rows 8 to 15.
INLINE void zip_columns(Bytes& first, Bytes& second) {
  const auto low = [&](int i) __attribute__((always_inline)) {
    return vreinterpretq_u8_u32(vzip1q_u32(vreinterpretq_u32_u8(first.v[i]), vreinterpretq_u32_u8(second.v[i])));
  };
  const auto high = [&](int i) __attribute__((always_inline)) {
    return vreinterpretq_u8_u32(vzip2q_u32(vreinterpretq_u32_u8(first.v[i]), vreinterpretq_u32_u8(second.v[i])));
  };
  const Bytes upper{{low(0), high(0), low(1), high(1)}}, lower{{low(2), high(2), low(3), high(3)}};
  first = upper;
  second = lower;
}

INLINE TokenPairs zip_tokens(const int8_t* first, const int8_t* second) {
  const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(first)), b = vreinterpretq_s64_s8(vld1q_s8(second));
  return {{vreinterpretq_s8_s64(vzip1q_s64(a, b)), vreinterpretq_s8_s64(vzip2q_s64(a, b))}};
}

INLINE BlockSums no_block_sums() {
  const int32x4_t none = vdupq_n_s32(0);
  EACH_ROW_PAIR(((void)i, none));
}

// Adds the products of eight columns of zipped k-groups with two tokens.
INLINE BlockSums step(const BlockSums& sums, const Bytes& upper, const Bytes& lower, int8x16_t tokens) {
  EACH_ROW_PAIR(vmmlaq_s32(sums.v[i], vreinterpretq_s8_u8(i < 4 ? upper.v[i & 3] : lower.v[i & 3]), tokens));
}

INLINE BlockSums add(const BlockSums& a, const BlockSums& b) { EACH_ROW_PAIR(vaddq_s32(a.v[i], b.v[i])); }
INLINE BlockSums add_scaled(const BlockSums& total, const BlockSums& sums, const BlockSums& scales) {
  EACH_ROW_PAIR(vmlaq_s32(total.v[i], sums.v[i], scales.v[i]));
}

// Repeats the number of each row for both tokens.
INLINE BlockSums twice(I32x16 x) {
  EACH_ROW_PAIR(i % 2 == 0 ? vzip1q_s32(x.v[i / 2], x.v[i / 2]) : vzip2q_s32(x.v[i / 2], x.v[i / 2]));
}

// Separates the lanes of the two tokens.
INLINE void unzip_tokens(const BlockSums& sums, I32x16& first, I32x16& second) {
  UNROLL for (int i = 0; i < 4; i++) {
    first.v[i] = vuzp1q_s32(sums.v[2 * i], sums.v[2 * i + 1]);
    second.v[i] = vuzp2q_s32(sums.v[2 * i], sums.v[2 * i + 1]);
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
