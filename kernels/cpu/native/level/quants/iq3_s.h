// IQ3_S: weight = scale * s[j] * (2 n - 15) in sub-block j of 32, its grid resolved: every level with its sign is four
// bits. Body: nibbles of 8 sub-blocks; s. Tail: scale.
#pragma once

#include "level/quants/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct IQ3_S {
  static constexpr QuantType kType = QuantType::IQ3_S;
  static constexpr TileLayout kLayout = kIQ3_SLayout;
  static constexpr int kSubBlocks = 8, kBits = 5, kOffset = 16;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    const Bytes line = load_bytes(body + 256 * j + 64 * (g & 3));
    return merge(g < 4 ? field<-1, 30>(line) : field<3, 30>(line), as_bytes(broadcast(0x01010101)));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 2048, out); }
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
