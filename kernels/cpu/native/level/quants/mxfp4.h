// MXFP4: weight = scale * value[q], the values twice the numbers of E2M1, the scale 2^(e - 128).
// Body: nibbles; tail: e, a byte a row.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, plus 12: below 25, so that five bits hold them.
alignas(16) TABLE uint8_t kFP4Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct MXFP4 {
  static constexpr QuantType kType = QuantType::MXFP4;
  static constexpr TileLayout kLayout = kMXFP4Layout;
  static constexpr int kSubBlocks = 1, kBits = 5, kOffset = 12;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int, int g) { return lookup(kFP4Values, nibble_group(body, g)); }
  static DECODE F32x16 scale(Lines tail) { return from_halved_e8m0(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
