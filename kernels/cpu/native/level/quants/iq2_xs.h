// IQ2_XS: weight = scale / 8 * s[j] * +-v in sub-block j of 16, v one of three.
// Body: low bytes of the indices of the points of 32 columns as bytes 0, 2, 1, 3 of a line; a line of their ninth bits,
// of sub-block j bits j and 16 + j of each lane; signs; two lines of s. Tail: scale.
#pragma once

#include "level/quants/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct IQ2_XS {
  static constexpr QuantType kType = QuantType::IQ2_XS;
  static constexpr TileLayout kLayout = kIQ2_XSLayout;
  static constexpr int kSubBlocks = 16, kBits = 8, kOffset = 128;
  static constexpr int kDirectTokens = kGridDirectTokens;
  static constexpr bool kHasMin = false;
  static DECODE Bytes group(Lines body, int j, int g) {
    const I32x16 ninth = keep(shift_right(as_lanes(load_bytes(body + 512)), j), 0x00010001);
    const I32x16 index = either(two_indices(body + j / 2 * 64, j % 2), shift_left<8>(ninth));
    return iq2_group(lookup_points<512>(kIQ2_XSGrid.point, index), body + 576 + 32 * j, g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales(body + 1088, out);
    odd_scales(body + 1152, out + 8);
  }
  static DECODE F32x16 scale(Lines tail) { return load_f16_times(tail, 0.125f); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
