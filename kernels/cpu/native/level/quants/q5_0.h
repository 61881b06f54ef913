// Q5_0: weight = scale * (q - 16). Body: five lines of quants; tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q5_0 {
  static constexpr QuantType kType = QuantType::Q5_0;
  static constexpr TileLayout kLayout = kQ5_0Layout;
  static constexpr int kSubBlocks = 1, kBits = 5, kOffset = 16;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int, int g) { return five_bit_group(body, g); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
