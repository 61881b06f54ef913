// IQ4_XS: weight = scale * s[j] * value[q] in sub-block j of 32; s is signed, the values are those of IQ4_NL.
// A segment's integers stay within 256 * 127 * 127 * 32 < 2^27.
// Body: nibbles of 8 sub-blocks, then two lines of s as k-groups over j. Tail: scale.
#pragma once

#include "level/quants/iq4_nl.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct IQ4_XS {
  static constexpr QuantType kType = QuantType::IQ4_XS;
  static constexpr TileLayout kLayout = kIQ4_XSLayout;
  static constexpr int kSubBlocks = 8, kBits = 8, kOffset = 128;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    return lookup(kIQ4Values, nibble_group(body + 256 * j, g));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) {
    for (int i = 0; i < 2; i++) signed_scales(load_bytes(body + 2048 + 64 * i), out + 4 * i);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
