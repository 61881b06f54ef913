// Q8_0: weight = scale * (q - 128). Body: a line a k-group; tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q8_0 {
  static constexpr QuantType kType = QuantType::Q8_0;
  static constexpr TileLayout kLayout = kQ8_0Layout;
  static constexpr int kSubBlocks = 1, kBits = 8, kOffset = 128;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int, int g) { return load_bytes(body + 64 * g); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
