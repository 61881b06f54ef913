// Weights of IQ2 types, +-8, +-25 or +-43, from levels and signs, and those of IQ3_XXS from levels.
#pragma once

#include "level/quants/decoder.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// How far above -44 they are.
constexpr uint8_t signed_level(int level, bool negative) {
  constexpr int values[4] = {8, 25, 43, 0};
  return static_cast<uint8_t>(44 + (negative ? -values[level] : values[level]));
}

// By four bits: a level in bits 2 * high and 2 * high + 1, and its sign in the lower or the upper of the two other bits.
struct SignedLevels {
  uint8_t of[2][2][16];  // [high][upper]
  constexpr SignedLevels() : of{} {
    for (int high = 0; high < 2; high++)
      for (int upper = 0; upper < 2; upper++)
        for (int i = 0; i < 16; i++)
          of[high][upper][i] = signed_level(i >> 2 * high & 3, (i >> (2 - 2 * high + upper) & 1) != 0);
  }
};
TABLE SignedLevels kIQ2Values;

TABLE uint8_t kIQ3Values[16] = {32 + 2, 32 + 6, 32 + 10, 32 + 14, 32 + 18, 32 + 22, 32 + 26, 32 + 31};  // plus 32

// k-group g of 32 columns, of even ones the levels in the low halves of bytes and of odd ones in the high, from their bit 0
// on or, if `high`, 2. A line has the sign of k-group g in bit 4 * (g % 2) + 2 * (1 - g / 2 % 2) + g / 4.
template <bool high>
DECODE Bytes iq2_group(Bytes levels, Bytes signs, int g) {
  constexpr int mask = high ? 0xcc : 0x33;
  const Bytes codes = merge(field<0, mask>(levels), field<0, 255 - mask>(signs));
  return lookup(kIQ2Values.of[high][g / 4], g % 2 == 0 ? field<0, 15>(codes) : field<4, 15>(codes));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
