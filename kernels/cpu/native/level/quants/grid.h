// What decoders of the IQ types share (the levels of their weights: grids.h). Signs are a bit a weight in the order of a
// k-group's bytes, 8 bytes a k-group, set where it is negative; sub-block scales are odd, 2 s + 1 of three or four bits.
#pragma once

#include "level/quants/fields.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Decoding twice costs more than a panel.
constexpr int kGridDirectTokens = 8;

TABLE uint8_t kOdd[16] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// A line of eight scales as k-groups: s[0-3] in the low halves, s[4-7] in the high.
template <int bits = 4>
DECODE void odd_scales(Lines line, Scale* out) {
  const Bytes nibbles = load_bytes(line);
  unsigned_scales(lookup(kOdd, field<0, (1 << bits) - 1>(nibbles)), out);
  unsigned_scales(lookup(kOdd, field<4, (1 << bits) - 1>(nibbles)), out + 4);
}

// Bytes h and h + 2 of every lane as its halves.
[[maybe_unused]] DECODE I32x16 two_indices(Lines line, int h) {
  return keep(shift_right(as_lanes(load_bytes(line)), 8 * h), 0x00ff00ff);
}

// Magnitudes of the three levels of IQ2 types, plus 128: less it, a byte is signed.
TABLE uint8_t kIQ2Values[16] = {128 + 8, 128 + 25, 128 + 43};

// k-group g of two points, eight weights each. Spread and masked, a point has the levels of columns 0 to 3 in the low
// halves of its bytes and those of columns 4 to 7 in the high.
[[maybe_unused]] DECODE Bytes iq2_group(Points points, Lines signs, int g) {
  const Bytes levels = field<0, 0x33>(spread<2>(points, g / 2));
  return with_signs<128>(lookup(kIQ2Values, g % 2 == 0 ? levels : field<4, 3>(levels)), signs + 8 * g);
}

[[maybe_unused]] DECODE F32x16 load_f16_times(Lines p, float factor) {
  return mul(load_f16(p), broadcast(factor));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
