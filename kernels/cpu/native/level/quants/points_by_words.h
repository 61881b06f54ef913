// Levels of the points of grids, looked up two points a lane (simd/dot.h). Indices are in lines, four points of 16 or 32
// columns to a lane as bytes 0, 2, 1 and 3.
#pragma once

#include "level/quants/signed_levels.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Bytes h and h + 2 of every lane as its halves.
[[maybe_unused]] DECODE I32x16 two_indices(Lines line, int h) {
  return keep(shift_right(as_lanes(load_bytes(line)), 8 * h), 0x00ff00ff);
}

// k-group g of 32 columns, with signs. Spread, a point has the levels of its columns 0 to 3 in the low halves of bytes and
// those of 4 to 7 in the high.
template <int n>
DECODE Bytes iq2_points(const Grid<n>& grid, I32x16 index, Lines signs, int g) {
  const Bytes levels = spread<2>(lookup_points<n>(grid.point, index), g / 2 % 2), bits = load_bytes(signs);
  return iq2_group<false>(levels, g / 2 % 2 == 0 ? bits : field<-2, 0xcc>(bits), g);
}
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<256>& grid, Lines line, Lines signs, int g) {
  return iq2_points(grid, two_indices(line, g / 4), signs, g);
}

// In a grid of 512 points, bit i of the bytes of another line are ninth bits.
using NineBitPoints = Lines;
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<512>& grid, NineBitPoints body, int i, int g) {
  const I32x16 ninth = keep(shift_right(as_lanes(load_bytes(body + 512)), g / 4 * 8 + i), 0x00010001);
  return iq2_points(grid, either(two_indices(body + 64 * i, g / 4), shift_left<8>(ninth)), body + 576 + 64 * i, g);
}

// k-group g of 16 columns, without signs, plus 32.
[[maybe_unused]] DECODE Bytes iq3_points(const Grid<256>& grid, Lines line, int g) {
  return lookup(kIQ3Values, spread<4>(lookup_points<256>(grid.point, two_indices(line, g / 2)), g % 2));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
