// The functions of points_by_words.h for AVX2, which would have to assemble words one by one. One load per row reads
// all columns of its point.
#pragma once

#include "level/quants/signed_levels.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

[[maybe_unused]] DECODE Bytes with_iq2_signs(Bytes levels, Lines signs, int g) {
  // Signs go to bit 2, and those of the last four k-groups to bit 3.
  constexpr Places places{{0, 4, -2, 2, 0, 4, -2, 2}, {4, 4, 4, 4, 8, 8, 8, 8}};
  return lookup(kIQ2Values.of[0][g / 4], merge(levels, field_of<places>(load_bytes(signs), g)));
}

// Returns k-group g of 32 columns, with point indices of eight bits.
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<256>&, Lines line, Lines signs, int g) {
  const auto point = [&](int row) __attribute__((always_inline)) {
    return kIQ2_XXSColumns.of[line[4 * row + kIndexPlace[g / 2]]];
  };
  return with_iq2_signs(four_of_eight(point, g % 2), signs, g);
}

// A body with point indices of nine bits, which are assembled once per segment.
struct NineBitPoints {
  Lines signs;
  alignas(64) uint16_t index[8][64];
  DECODE explicit NineBitPoints(Lines body) : signs(body + 576) {
    for (int i = 0; i < 8; i++) nine_bits(body + 64 * i, body + 512, i, index[i]);
  }
};
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<512>&, const NineBitPoints& points, int i, int g) {
  const auto point = [&](int row) __attribute__((always_inline)) {
    return kIQ2_XSColumns.of[points.index[i][4 * row + kIndexPlace[g / 2]]];
  };
  return with_iq2_signs(four_of_eight(point, g % 2), points.signs + 64 * i, g);
}

[[maybe_unused]] DECODE Bytes iq3_points(const Grid<256>&, Lines line, int g) {
  const auto point = [&](int row) __attribute__((always_inline)) {
    return kIQ3_XXSColumns.of[line[4 * row + kIndexPlace[g]]];
  };
  return lookup(kIQ3Values, four_of_four(point));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
