// IQ2_XXS: weight = scale / 8 * s[j] * +-v in sub-block j of 32, v one of three.
// Body: the indices of four points as bytes 0, 2, 1, 3 of line j; signs; s. Tail: scale.
#pragma once

#include "level/quants/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct IQ2_XXS {
  static constexpr QuantType kType = QuantType::IQ2_XXS;
  static constexpr TileLayout kLayout = kIQ2_XXSLayout;
  static constexpr int kSubBlocks = 8, kBits = 8, kOffset = 128;
  static constexpr int kDirectTokens = kGridDirectTokens;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    const Points points = lookup_points<256>(kIQ2_XXSGrid.point, two_indices(body + 64 * j, g / 4));
    return iq2_group(points, body + 512 + 64 * j + g / 4 * 32, g % 4);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 1024, out); }
  static DECODE F32x16 scale(Lines tail) { return load_f16_times(tail, 0.125f); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
