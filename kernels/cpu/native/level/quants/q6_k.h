// Q6_K: weight = scale * s[j] * (q - 32) in sub-block j of 16; s is signed.
// Body: per sub-block a line of nibbles for k-groups 0 (low) and 2 (high), one for 1 and 3, one of bits 4-5 of them;
// then four lines of s as k-groups over j. Tail: scale.
#pragma once

#include "level/quants/fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q6_K {
  static constexpr QuantType kType = QuantType::Q6_K;
  static constexpr TileLayout kLayout = kQ6_KLayout;
  static constexpr int kSubBlocks = 16, kBits = 6, kOffset = 32;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    Lines lines = body + 192 * j;
    constexpr Places low{{0, 0, 4, 4}, {15, 15, 15, 15}}, high{{-4, -2, 0, 2}, {48, 48, 48, 48}};
    return merge(field_of<low>(load_bytes(lines + 64 * (g & 1)), g), field_of<high>(load_bytes(lines + 128), g));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) signed_scales(load_bytes(body + 3072 + 64 * i), out + 4 * i);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
