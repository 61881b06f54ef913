// Ternary levels. The levels of one column in four k-groups take seven bits: a place of four bits and a deviation of
// three (pack/grids.h). For 128 columns there are four lines of places, each with 16 columns in the low and 16 in the
// high nibbles, followed by three lines of deviations.
#pragma once

#include "level/quants/decoder.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kThirdsBytes = 14 * 64;

// Returns the levels of four k-groups, as four bit pairs for each column.
[[maybe_unused]] DECODE Bytes thirds(Lines lines, int i) {
  const Bytes places = load_bytes(lines + i / 8 * 448 + i % 8 / 2 * 64);
  const Bytes place = lookup(kThirdsPlace, i % 2 == 0 ? field<0, 15>(places) : field<4, 15>(places));
  return add_bytes(place, lookup(kThirdsAround, three_bit_group(lines + i / 8 * 448 + 256, i % 8)));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
