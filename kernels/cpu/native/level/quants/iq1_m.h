// IQ1_M: weight = scale / 8 * s[j] * (8 v +- 1) in sub-block j of 16 (the sign of 1 of eight columns), v -1, 0 or 1.
// Body: levels (thirds.h); two lines of s in three bits, above them a bit that is set for + 1 in the first eight
// columns; such bits of the other eight, 16 of each row; scale.
#pragma once

#include "level/quants/thirds.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct IQ1_M {
  static constexpr QuantType kType = QuantType::IQ1_M;
  static constexpr TileLayout kLayout = kIQ1_MLayout;
  static constexpr int kSubBlocks = 16, kBits = 5, kOffset = 16;
  static constexpr int kDirectTokens = kGridDirectTokens;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) { return iq1_group(body, up(body, j, g / 2), j, g); }
  static DECODE I32x16 up(Lines body, int j, int eight) {
    Lines lines = body + kThirdsBytes;
    const int place = j % 4 * 8 + j % 8 / 4 * 4 + 3;
    if (eight == 0) return keep(shift_right(as_lanes(load_bytes(lines + j / 8 * 64)), place), 1);
    const I32x16 upper_halves = float_to_bits(from_bf16(halves(lines + 128)));
    return keep(shift_right(upper_halves, 16 + j), 1);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales<3>(body + kThirdsBytes, out);
    odd_scales<3>(body + kThirdsBytes + 64, out + 8);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16_times(tail - 32, 0.125f); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
