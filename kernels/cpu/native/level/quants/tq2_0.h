// TQ2_0: weight = scale * (q - 1), q one of 0, 1, 2 and, in files that no quantizer wrote, 3.
// Body: for every 32 columns two lines, k-groups i, i + 2, i + 4 and i + 6 in line i from its lowest bits on.
// Tail: scale.
#pragma once

#include "fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct TQ2_0 {
  static constexpr QuantType kType = QuantType::TQ2_0;
  static constexpr TileLayout kLayout = kTQ2_0Layout;
  static constexpr int kSubBlocks = 8, kBits = 2, kOffset = 1;  // sub-blocks without scales
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(const uint8_t* body, int j, int g) {
    const Bytes line = load_bytes(body + 128 * j + 64 * (g & 1));
    switch (g >> 1) {
      case 0: return field<0, 3>(line);
      case 1: return field<2, 3>(line);
      case 2: return field<4, 3>(line);
      default: return field<6, 3>(line);
    }
  }
  static DECODE F32x16 scale(const uint8_t* tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
