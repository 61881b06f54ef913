// Q4_0: weight = scale * (q - 8). Body: nibbles; tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q4_0 {
  static constexpr QuantType kType = QuantType::Q4_0;
  static constexpr TileLayout kLayout = kQ4_0Layout;
  static constexpr int kSubBlocks = 1, kBits = 4, kOffset = 8;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int, int g) { return nibble_group(body, g); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
