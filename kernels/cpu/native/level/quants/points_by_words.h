// Levels of the points of grids, looked up two points per lane (simd/dot.h). A lane of a line has the indices of four
// points, of 16 or 32 columns, as bytes 0, 2, 1 and 3.
#pragma once

#include "level/quants/signed_levels.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Returns bytes h and h + 2 of every lane as its two halves.
[[maybe_unused]] DECODE I32x16 two_indices(Lines line, int h) {
  return keep(shift_right(as_lanes(load_bytes(line)), 8 * h), 0x00ff00ff);
}

// Returns k-group g of 32 columns, with signs. After spread(), a point's columns 0 to 3 are in the low nibbles of the
// bytes and its columns 4 to 7 in the high ones.
template <int n>
DECODE Bytes iq2_points(const Grid<n>& grid, I32x16 index, Lines signs, int g) {
  const Bytes levels = spread<2>(lookup_points<n>(grid.point, index), g / 2 % 2), bits = load_bytes(signs);
  return iq2_group<false>(levels, g / 2 % 2 == 0 ? bits : field<-2, 0xcc>(bits), g);
}
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<256>& grid, Lines line, Lines signs, int g) {
  return iq2_points(grid, two_indices(line, g / 4), signs, g);
}

// In a grid of 512 points, indices have nine bits. The ninth bits of line i are bit i of the bytes of another line.
using NineBitPoints = Lines;
[[maybe_unused]] DECODE Bytes iq2_points(const Grid<512>& grid, NineBitPoints body, int i, int g) {
  const I32x16 ninth = keep(shift_right(as_lanes(load_bytes(body + 512)), g / 4 * 8 + i), 0x00010001);
  return iq2_points(grid, either(two_indices(body + 64 * i, g / 4), shift_left<8>(ninth)), body + 576 + 64 * i, g);
}

// Returns k-group g of 16 columns, without signs and with an offset of 32.
[[maybe_unused]] DECODE Bytes iq3_points(const Grid<256>& grid, Lines line, int g) {
  return lookup(kIQ3Values, spread<4>(lookup_points<256>(grid.point, two_indices(line, g / 2)), g % 2));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
