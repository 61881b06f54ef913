// IQ2_S: weight = scale / 8 * s[j] * +-v in sub-block j of 16, v one of three.
// Body: levels (thirds.h); signs; two lines of s. Tail: scale.
#pragma once

#include "level/quants/thirds.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

TABLE Thirds kIQ2Thirds{128 + 8, 128 + 25, 128 + 43};

struct IQ2_S {
  static constexpr QuantType kType = QuantType::IQ2_S;
  static constexpr TileLayout kLayout = kIQ2_SLayout;
  static constexpr int kSubBlocks = 16, kBits = 8, kOffset = 128;
  static constexpr int kDirectTokens = kGridDirectTokens;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    return with_signs<kOffset>(thirds_group(kIQ2Thirds, body, j, g), body + kThirdsBytes + 32 * j + 8 * g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales(body + 1408, out);
    odd_scales(body + 1472, out + 8);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16_times(tail, 0.125f); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
