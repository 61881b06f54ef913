// Q2_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 16; s and m have 4 bits.
// Body: a line of bit pairs for each of 16 sub-blocks, k-group 0 lowest; then four lines as k-groups over j: s low, m high.
// Tail: scale, min.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q2_K {
  static constexpr QuantType kType = QuantType::Q2_K;
  static constexpr TileLayout kLayout = kQ2_KLayout;
  static constexpr int kSubBlocks = 16, kBits = 2, kOffset = 0;
  static constexpr bool kHasMin = true;
  static DECODE Bytes group(Lines body, int j, int g) {
    constexpr Places pairs{{0, 2, 4, 6}, {3, 3, 3, 3}};
    return field_of<pairs>(load_bytes(body + 64 * j), g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) unsigned_scales(field<0, 15>(load_bytes(body + 1024 + 64 * i)), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    for (int i = 0; i < 4; i++) out[i] = field<4, 15>(load_bytes(body + 1024 + 64 * i));
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
  static DECODE F32x16 min(Lines tail) { return load_f16(tail + 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
