// Q5_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 32; s and m have 6 bits.
// Body: five lines of quants for each of 8 sub-blocks, then s and m. Tail: scale, min.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q5_K {
  static constexpr QuantType kType = QuantType::Q5_K;
  static constexpr TileLayout kLayout = kQ5_KLayout;
  static constexpr int kSubBlocks = 8, kBits = 5, kOffset = 0;
  static constexpr bool kHasMin = true;
  static DECODE Bytes group(Lines body, int j, int g) { return five_bit_group(body + 320 * j, g); }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { six_bit_scales(body + 2560, out); }
  static DECODE void sub_mins(Lines body, Bytes (&out)[2]) { six_bit_mins(body + 2560, out); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
  static DECODE F32x16 min(Lines tail) { return load_f16(tail + 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
