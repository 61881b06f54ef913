// Q5_1: weight = scale * q + min. Body: five lines of quants; tail: scale, min.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q5_1 {
  static constexpr QuantType kType = QuantType::Q5_1;
  static constexpr TileLayout kLayout = kQ5_1Layout;
  static constexpr int kSubBlocks = 1, kBits = 5, kOffset = 0;
  static constexpr bool kHasMin = true;
  static DECODE Bytes group(Lines body, int, int g) { return five_bit_group(body, g); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
  static DECODE F32x16 min(Lines tail) { return load_f16(tail + 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
