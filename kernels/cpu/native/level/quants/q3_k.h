// Q3_K: weight = scale * s[j] * (q - 4) in sub-block j of 16; s is six bits less 32.
// Body: three lines for each pair of the 16 sub-blocks, whose k-groups are 0 to 3 and 4 to 7. Bits 0-2 and 3-5 of the
// lines are groups 0 and 1, 2 and 3, 4 and 5; above them stand bits 0-1 of group 6, the same of group 7, and bit 2 of
// both. Then three lines as k-groups over j: s[0-3] | s[12-15] bits 0-1, s[4-7] | bits 2-3, s[8-11] | bits 4-5.
// Tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q3_K {
  static constexpr QuantType kType = QuantType::Q3_K;
  static constexpr TileLayout kLayout = kQ3_KLayout;
  static constexpr int kSubBlocks = 16, kBits = 3, kOffset = 4, kTogether = 2;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    Lines lines = body + 192 * (j / 2);
    constexpr Places low{{0, 3, 0, 3, 0, 3, 6, 6}, {7, 7, 7, 7, 7, 7, 3, 3}};
    constexpr Places third{{0, 0, 0, 0, 0, 0, 4, 5}, {0, 0, 0, 0, 0, 0, 4, 4}};
    const int i = 4 * (j % 2) + g;
    const Bytes bits = field_of<low>(load_bytes(lines + 64 * (i < 6 ? i / 2 : i - 6)), i);
    return i < 6 ? bits : merge(bits, field_of<third>(load_bytes(lines + 128), i));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    const Bytes a = load_bytes(body + 1536), b = load_bytes(body + 1600), c = load_bytes(body + 1664);
    unsigned_scales<32>(field<0, 63>(a), out);
    unsigned_scales<32>(field<0, 63>(b), out + 4);
    unsigned_scales<32>(field<0, 63>(c), out + 8);
    unsigned_scales<32>(merge(field<6, 3>(a), merge(field<4, 12>(b), field<2, 48>(c))), out + 12);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
