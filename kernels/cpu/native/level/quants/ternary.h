// Decoders of types of three values.
#pragma once

#include "level/quants/decoder.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// TQ2_0: weight = scale * (q - 1), q one of 0, 1, 2 and, in files that no quantizer wrote, 3.
// Body: for every 32 columns two lines, k-groups i, i + 2, i + 4 and i + 6 in line i from its lowest bits on.
// Tail: scale. Its sub-blocks have no scales.
//
// TQ1_0: the same. Digits to base three are pairs of bits in a tile: taking them apart for every product would cost more
// time than the bytes that it saves.
template <QuantType type>
struct Ternary : Decoder<type, 8, 2, 1> {
  static DECODE Bytes group(Lines body, int j, int g) {
    constexpr Places pairs{{0, 0, 2, 2, 4, 4, 6, 6}, {3, 3, 3, 3, 3, 3, 3, 3}};
    return field_of<pairs>(load_bytes(body + 128 * j + 64 * (g & 1)), g);
  }
};
using TQ2_0 = Ternary<QuantType::TQ2_0>;
using TQ1_0 = Ternary<QuantType::TQ1_0>;

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
