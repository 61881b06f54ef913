// Weights of three levels, in seven bits for a column of four k-groups: places in four, what is around them in three
// (pack/grids.h). Of 128 columns four lines of places, 16 columns in the low halves and 16 in the high, then three of the
// others.
#pragma once

#include "level/quants/decoder.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kThirdsBytes = 14 * 64;

// The levels of four k-groups, column by column as four pairs of bits.
[[maybe_unused]] DECODE Bytes thirds(Lines lines, int i) {
  const Bytes places = load_bytes(lines + i / 8 * 448 + i % 8 / 2 * 64);
  const Bytes place = lookup(kThirdsPlace, i % 2 == 0 ? field<0, 15>(places) : field<4, 15>(places));
  return add_bytes(place, lookup(kThirdsAround, three_bit_group(lines + i / 8 * 448 + 256, i % 8)));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
