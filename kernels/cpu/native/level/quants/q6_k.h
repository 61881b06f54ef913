// Q6_K: weight = scale * s[j] * (q - 32) in sub-block j of 16; s is signed.
// Body: per sub-block a line of nibbles for k-groups 0 (low) and 2 (high), one for 1 and 3, one of bits 4-5 of them;
// then four lines of s as k-groups over j. Tail: scale.
#pragma once

#include "fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q6_K {
  static constexpr QuantType kType = QuantType::Q6_K;
  static constexpr TileLayout kLayout = kQ6_KLayout;
  static constexpr int kSubBlocks = 16, kBits = 6, kOffset = 32;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(const uint8_t* body, int j, int g) {
    const uint8_t* lines = body + 192 * j;
    const Bytes low = load_bytes(lines + 64 * (g & 1)), high = load_bytes(lines + 128);
    switch (g) {
      case 0: return merge(field<0, 15>(low), field<-4, 48>(high));
      case 1: return merge(field<0, 15>(low), field<-2, 48>(high));
      case 2: return merge(field<4, 15>(low), field<0, 48>(high));
      default: return merge(field<4, 15>(low), field<2, 48>(high));
    }
  }
  static DECODE void sub_scales(const uint8_t* body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) signed_scales(load_bytes(body + 3072 + 64 * i), out + 4 * i);
  }
  static DECODE F32x16 scale(const uint8_t* tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
