// Q4_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 32; s and m have 6 bits.
// Body: nibbles of 8 sub-blocks; then three lines as k-groups over j, six bits and two: s[0-3] | m[4-7] bits 0-1,
// s[4-7] | m[4-7] bits 2-3, m[0-3] | m[4-7] bits 4-5. Tail: scale, min.
#pragma once

#include "fields.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Q4_K {
  static constexpr QuantType kType = QuantType::Q4_K;
  static constexpr TileLayout kLayout = kQ4_KLayout;
  static constexpr int kSubBlocks = 8, kBits = 4, kOffset = 0;
  static constexpr bool kHasMin = true;
  static DECODE Bytes group(const uint8_t* body, int j, int g) { return nibble_group(body + 256 * j, g); }
  static DECODE void sub_scales(const uint8_t* body, Scale (&out)[8]) {
    unsigned_scales(field<0, 63>(load_bytes(body + 2048)), out);
    unsigned_scales(field<0, 63>(load_bytes(body + 2112)), out + 4);
  }
  static DECODE void sub_mins(const uint8_t* body, Bytes (&out)[2]) {
    const Bytes a = load_bytes(body + 2048), b = load_bytes(body + 2112), c = load_bytes(body + 2176);
    out[0] = field<0, 63>(c);
    out[1] = merge(field<6, 3>(a), merge(field<4, 12>(b), field<2, 48>(c)));
  }
  static DECODE F32x16 scale(const uint8_t* tail) { return load_f16(tail); }
  static DECODE F32x16 min(const uint8_t* tail) { return load_f16(tail + 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
