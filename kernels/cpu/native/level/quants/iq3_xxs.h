// IQ3_XXS: weight = scale / 2 * s[j] * +-v in sub-block j of 32, v one of eight.
// Body: the indices of four points as bytes 0, 2, 1, 3 of a line; signs; s. Tail: scale.
#pragma once

#include "level/quants/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

TABLE uint8_t kIQ3Values[16] = {128 + 2, 128 + 6, 128 + 10, 128 + 14, 128 + 18, 128 + 22, 128 + 26, 128 + 31};

struct IQ3_XXS {
  static constexpr QuantType kType = QuantType::IQ3_XXS;
  static constexpr TileLayout kLayout = kIQ3_XXSLayout;
  static constexpr int kSubBlocks = 8, kBits = 8, kOffset = 128;
  static constexpr int kDirectTokens = kGridDirectTokens;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    const I32x16 index = two_indices(body + 128 * j + g / 4 * 64, g / 2 % 2);
    const Bytes levels = spread<4>(lookup_points<256>(kIQ3_XXSGrid.point, index), g % 2);
    return with_signs<kOffset>(lookup(kIQ3Values, levels), body + 1024 + 64 * j + 8 * g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 1536, out); }
  static DECODE F32x16 scale(Lines tail) { return load_f16_times(tail, 0.5f); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
