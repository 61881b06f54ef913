// IQ4_NL: weight = scale * value[q], sixteen values of uneven steps. Body: nibbles; tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// The values of IQ4_NL and IQ4_XS, -127 to 113, plus 128.
alignas(16) TABLE uint8_t kIQ4Values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                129, 141, 153, 166, 181, 197, 217, 241};

struct IQ4_NL {
  static constexpr QuantType kType = QuantType::IQ4_NL;
  static constexpr TileLayout kLayout = kQ4_0Layout;
  static constexpr int kSubBlocks = 1, kBits = 8, kOffset = 128;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int, int g) { return lookup(kIQ4Values, nibble_group(body, g)); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
