// Q2_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 16; s and m have 4 bits.
// Body: a line of bit pairs for each of 16 sub-blocks, k-group 0 lowest; then four lines as k-groups over j: s low, m high.
// Tail: scale, min.
#pragma once

#include "fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q2_K {
  static constexpr QuantType kType = QuantType::Q2_K;
  static constexpr TileLayout kLayout = kQ2_KLayout;
  static constexpr int kSubBlocks = 16, kBits = 2, kOffset = 0;
  static constexpr bool kHasMin = true;
  static DECODE Bytes group(const uint8_t* body, int j, int g) {
    const Bytes line = load_bytes(body + 64 * j);
    switch (g) {
      case 0: return field<0, 3>(line);
      case 1: return field<2, 3>(line);
      case 2: return field<4, 3>(line);
      default: return field<6, 3>(line);
    }
  }
  static DECODE void sub_scales(const uint8_t* body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) unsigned_scales(field<0, 15>(load_bytes(body + 1024 + 64 * i)), out + 4 * i);
  }
  static DECODE void sub_mins(const uint8_t* body, Bytes (&out)[4]) {
    for (int i = 0; i < 4; i++) out[i] = field<4, 15>(load_bytes(body + 1024 + 64 * i));
  }
  static DECODE F32x16 scale(const uint8_t* tail) { return load_f16(tail); }
  static DECODE F32x16 min(const uint8_t* tail) { return load_f16(tail + 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
