// IQ1_S: weight = scale / 8 * s[j] * (8 v +- 1) in sub-block j of 16 columns (s and the sign of 1 of 32), v -1, 0 or 1.
// Body: levels (thirds.h); a line of s in three bits, above them a bit that is set for + 1. Tail: scale.
#pragma once

#include "level/quants/thirds.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct IQ1_S {
  static constexpr QuantType kType = QuantType::IQ1_S;
  static constexpr TileLayout kLayout = kIQ1_SLayout;
  static constexpr int kSubBlocks = 16, kBits = 5, kOffset = 16;
  static constexpr int kDirectTokens = kGridDirectTokens;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    const int i = j / 2;
    const I32x16 up = keep(shift_right(as_lanes(load_bytes(body + kThirdsBytes)), i % 4 * 8 + i / 4 * 4 + 3), 1);
    return iq1_group(body, up, j, g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    Scale of_32[8];
    odd_scales<3>(body + kThirdsBytes, of_32);
    UNROLL for (int j = 0; j < 16; j++) out[j] = of_32[j / 2];
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16_times(tail, 0.125f); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
