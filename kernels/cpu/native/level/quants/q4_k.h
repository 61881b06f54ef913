// Q4_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 32; s and m have 6 bits.
// Body: nibbles of 8 sub-blocks, then s and m. Tail: scale, min.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q4_K {
  static constexpr QuantType kType = QuantType::Q4_K;
  static constexpr TileLayout kLayout = kQ4_KLayout;
  static constexpr int kSubBlocks = 8, kBits = 4, kOffset = 0;
  static constexpr bool kHasMin = true;
  static DECODE Bytes group(Lines body, int j, int g) { return nibble_group(body + 256 * j, g); }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { six_bit_scales(body + 2048, out); }
  static DECODE void sub_mins(Lines body, Bytes (&out)[2]) { six_bit_mins(body + 2048, out); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
  static DECODE F32x16 min(Lines tail) { return load_f16(tail + 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
