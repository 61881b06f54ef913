// The functions of points_by_words.h for levels with byte look-ups. 64 half points are looked up at once, and the bits
// of one k-group are then spread over bytes.
#pragma once

#include "level/quants/signed_levels.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Bits of a six-bit code that hold the level and the sign of each k-group. They have the positions of their lines,
// except two signs, which are moved down from bits 6 and 7.
constexpr int kLevelBit[8] = {0, 0, 2, 0, 0, 0, 2, 0}, kSignBit[8] = {2, 2, 0, 4, 3, 3, 1, 5};
constexpr bool kSignMoved[8] = {false, true, false, false, false, true, false, false};

struct SignedLevelsByCode {
  alignas(64) uint8_t of[8][64];
  constexpr SignedLevelsByCode() : of{} {
    for (int g = 0; g < 8; g++)
      for (int i = 0; i < 64; i++) of[g][i] = signed_level(i >> kLevelBit[g] & 3, (i >> kSignBit[g] & 1) != 0);
  }
};
constexpr SignedLevelsByCode kIQ2ValuesByCode;

template <int n>
DECODE Bytes iq2_points(const Grid<n>& grid, Lines line, Lines ninths, int i, Lines signs, int g) {
  const Bytes halves = lookup_byte<n>(grid.half[g % 2], load_bytes(line), ninths, i);
  const Bytes levels = spread_bits<2>(halves, 8 * kIndexPlace[g / 2] - kLevelBit[g]);
  const Bytes bits = kSignMoved[g] ? field<4, 15>(load_bytes(signs)) : load_bytes(signs);
  const Bytes codes = kLevelBit[g] == 0 ? choose<0x03030303>(levels, bits) : choose<0x0c0c0c0c>(levels, bits);
  return lookup(kIQ2ValuesByCode.of[g], codes);
}
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<256>& grid, Lines line, Lines signs, int g) {
  return iq2_points(grid, line, line, 0, signs, g);
}
using NineBitPoints = Lines;
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<512>& grid, NineBitPoints body, int i, int g) {
  return iq2_points(grid, body + 64 * i, body + 512, i, body + 576 + 64 * i, g);
}

// Values by a level of three bits. Bits 3 to 5 of an index belong to adjacent levels and are ignored.
struct IQ3ValuesByCode {
  alignas(64) uint8_t of[64];
  constexpr IQ3ValuesByCode() : of{} {
    for (int i = 0; i < 64; i++) of[i] = kIQ3Values[i % 8];
  }
};
constexpr IQ3ValuesByCode kIQ3ValuesByCode;

[[maybe_unused]] DECODE Bytes iq3_points(const Grid<256>& grid, Lines line, int g) {
  const Bytes index = load_bytes(line);
  const int from = 8 * kIndexPlace[g];
  const Bytes first = spread_bits<4>(lookup_byte<256>(grid.half[0], index, line, 0), from);
  const Bytes second = spread_bits<4>(lookup_byte<256>(grid.half[1], index, line, 0), from - 8);
  return lookup(kIQ3ValuesByCode.of, choose<0x0000ffff>(first, second));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
