// Weights of IQ2 types (+-8, +-25 or +-43) by level and sign, and weights of IQ3_XXS by level.
#pragma once

#include "level/quants/decoder.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Returns the weight with an offset of 44.
constexpr uint8_t signed_level(int level, bool negative) {
  constexpr int values[4] = {8, 25, 43, 0};
  return static_cast<uint8_t>(44 + (negative ? -values[level] : values[level]));
}

// Weights by four bits: a level in bits 2 * high and 2 * high + 1, and its sign in the lower or the upper of the other
// two.
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

// With an offset of 32.
TABLE uint8_t kIQ3Values[16] = {32 + 2, 32 + 6, 32 + 10, 32 + 14, 32 + 18, 32 + 22, 32 + 26, 32 + 31};

// Returns k-group g of 32 columns. Levels of even groups are in the low nibbles of bytes and those of odd groups in the
// high ones, starting at bit 0 of the nibble, or at bit 2 if `high`. A line of signs has the sign of k-group g in bit 4
// * (g % 2) + 2 * (1 - g / 2 % 2) + g / 4.
template <bool high>
DECODE Bytes iq2_group(Bytes levels, Bytes signs, int g) {
  constexpr int mask = high ? 0xcc : 0x33;
  const Bytes codes = merge(field<0, mask>(levels), field<0, 255 - mask>(signs));
  return lookup(kIQ2Values.of[high][g / 4], g % 2 == 0 ? field<0, 15>(codes) : field<4, 15>(codes));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
