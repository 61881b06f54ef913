// TQ2_0: weight = scale * (q - 1), q one of 0, 1, 2 and, in files that no quantizer wrote, 3.
// Body: for every 32 columns two lines, k-groups i, i + 2, i + 4 and i + 6 in line i from its lowest bits on.
// Tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct TQ2_0 {
  static constexpr QuantType kType = QuantType::TQ2_0;
  static constexpr TileLayout kLayout = kTQ2_0Layout;
  static constexpr int kSubBlocks = 8, kBits = 2, kOffset = 1;  // sub-blocks without scales
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    constexpr Places pairs{{0, 0, 2, 2, 4, 4, 6, 6}, {3, 3, 3, 3, 3, 3, 3, 3}};
    return field_of<pairs>(load_bytes(body + 128 * j + 64 * (g & 1)), g);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
