// Weights of three levels whose grid is resolved, in seven bits for a column of the four k-groups of a sub-block. With
// a = level 0 + 3 * level 1 and b = level 2 + 3 * level 3, both up to 8, they are four bits n and three bits m:
// n = b, m = a where a < 8; else n = 9, m = b where b < 8; else n = 10, m = 0.
// Lines of n for two sub-blocks each, then of bits 0-1 of m for four, then of bit 2 for eight; the first lowest.
#pragma once

#include "level/quants/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kThirdsBytes = 14 * 64;

// a of k-groups 0 and 1 or b of 2 and 3; what is above 8 stands for 8.
[[maybe_unused]] DECODE Bytes pair_of_levels(Lines lines, int j, int g) {
  constexpr uint8_t a_of_n[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 8};
  constexpr uint8_t b_of_n[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 8};
  constexpr uint8_t m_is_b[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0};
  const auto bits = [&](int line, int shift, int32_t mask) {
    return keep(shift_right(as_lanes(load_bytes(lines + 64 * line)), shift), mask);
  };
  const Bytes n = as_bytes(bits(j / 2, j % 2 * 4, 0x0f0f0f0f));
  const I32x16 low = bits(8 + j / 4, j % 4 * 2, 0x03030303), high = bits(12 + j / 8, j % 8, 0x01010101);
  const Bytes m = as_bytes(either(low, shift_left<2>(high)));
  if (g < 2) return merge(m, lookup(a_of_n, n));
  return merge(lookup(b_of_n, n), both(m, lookup(m_is_b, n)));
}

// The bytes x, y and z that levels 0, 1 and 2 stand for, by pairs of levels.
struct Thirds {
  uint8_t first[16], second[16];
  constexpr Thirds(uint8_t x, uint8_t y, uint8_t z)
      : first{x, y, z, x, y, z, x, y, z, z, z, z, z, z, z, z}, second{x, x, x, y, y, y, z, z, z, z, z, z, z, z, z, z} {}
};

// k-group g of sub-block j.
[[maybe_unused]] DECODE Bytes thirds_group(const Thirds& values, Lines lines, int j, int g) {
  return lookup(g % 2 == 0 ? values.first : values.second, pair_of_levels(lines, j, g));
}

// IQ1: eight times a level of -1, 0 or 1, and one less or more than it, plus 16; `up` has 0 or 1 in each lane.
TABLE Thirds kIQ1Values{7, 15, 23};
[[maybe_unused]] DECODE Bytes iq1_group(Lines lines, I32x16 up, int j, int g) {
  return add_bytes(thirds_group(kIQ1Values, lines, j, g), as_bytes(keep(sub(broadcast(0), up), 0x02020202)));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
