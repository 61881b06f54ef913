// Shared code of the decoders of quant types. A decoder defines the layout of a segment in a tile (body and tail:
// level/quant_types.h). It returns k-group g of sub-block j as unsigned bytes of kBits bits, each kOffset above the
// quant; the float scale; the min, if the type has one; and the integer scales and mins of the sub-blocks, if there are
// several.
#pragma once

#include "level/quant_types.h"
#include "simd/dot.h"

#ifndef DECODE
#define DECODE inline __attribute__((always_inline))
#define TABLE constexpr
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// k-groups of 32 columns in four lines. Groups g and g + 4 are the low and the high nibbles of line g.
[[maybe_unused]] DECODE Bytes nibble_group(Lines lines, int g) {
  const Bytes line = load_bytes(lines + 64 * (g & 3));
  return g < 4 ? field<0, 15>(line) : field<4, 15>(line);
}

// Returns pair i of the four bit pairs in each byte of a line.
[[maybe_unused]] DECODE Bytes bit_pair(Bytes line, int i) {
  constexpr Places pairs{{0, 2, 4, 6}, {3, 3, 3, 3}};
  return field_of<pairs>(line, i);
}

// Eight k-groups of three bits in three lines. Bits 0-2 and 3-5 of the lines are groups 0 and 1, 2 and 3, 4 and 5. Bits
// 6-7 are: in the first line bits 0-1 of group 6, in the second those of group 7, in the third bit 2 of both.
[[maybe_unused]] DECODE Bytes three_bit_group(Lines lines, int g) {
  constexpr Places low{{0, 3, 0, 3, 0, 3, 6, 6}, {7, 7, 7, 7, 7, 7, 3, 3}};
  constexpr Places third{{0, 0, 0, 0, 0, 0, 4, 5}, {0, 0, 0, 0, 0, 0, 4, 4}};
  const Bytes bits = field_of<low>(load_bytes(lines + 64 * (g < 6 ? g / 2 : g - 6)), g);
  return g < 6 ? bits : merge(bits, field_of<third>(load_bytes(lines + 128), g));
}

// Eight k-groups of five bits (32 columns) in five lines. Bits 0-4 of lines 0 to 4 are groups 0 to 4. Bits 5-7 are: in
// lines 0 to 2 bits 0-2 of groups 5 to 7; in line 3 bits 3-4 of group 5 and bit 3 of group 7; in line 4 bits 3-4 of
// group 6 and bit 4 of group 7.
[[maybe_unused]] DECODE Bytes five_bit_group(Lines lines, int g) {
  constexpr Places low{{0, 0, 0, 0, 0, 5, 5, 5}, {31, 31, 31, 31, 31, 7, 7, 7}};
  constexpr Places in_3{{0, 0, 0, 0, 0, 2, 0, 4}, {0, 0, 0, 0, 0, 24, 0, 8}};
  constexpr Places in_4{{0, 0, 0, 0, 0, 0, 2, 3}, {0, 0, 0, 0, 0, 0, 24, 16}};
  const Bytes bits = field_of<low>(load_bytes(lines + 64 * (g < 5 ? g : g - 5)), g);
  if (g < 5) return bits;
  return merge(bits, merge(field_of<in_3>(load_bytes(lines + 192), g), field_of<in_4>(load_bytes(lines + 256), g)));
}

[[maybe_unused]] DECODE F32x16 load_f16(Lines p) { return from_f16(halves(p)); }

// The properties of a type whose float16 scale is at the start of the tail.
template <QuantType type, int sub_blocks, int bits, int offset>
struct Decoder {
  static constexpr TileLayout kLayout = tile_layout(type);
  static constexpr int kSubBlocks = sub_blocks, kBits = bits, kOffset = offset;
  static constexpr bool kHasMin = false;
  // True if line i of the scales has those of sub-blocks 4i to 4i + 3, each in a byte or in a field at the same
  // position of a byte.
  static constexpr bool kScaleLines = false;
  static DECODE F32x16 scale(Lines tail) { return load_f16(tail); }
};

// A type with a float16 min after the scale.
template <QuantType type, int sub_blocks, int bits>
struct DecoderWithMin : Decoder<type, sub_blocks, bits, 0> {
  static constexpr bool kHasMin = true;
  static DECODE F32x16 min(Lines tail) { return load_f16(tail + 32); }
};

// Converts the four columns of a k-group, less `offset`, to scales per row.
template <int offset = 0>
[[maybe_unused]] DECODE void unsigned_scales(const Bytes& b, Scale* out) {
  out[0] = make_scale(sub(column<0>(b), broadcast(offset)));
  out[1] = make_scale(sub(column<1>(b), broadcast(offset)));
  out[2] = make_scale(sub(column<2>(b), broadcast(offset)));
  out[3] = make_scale(sub(column<3>(b), broadcast(offset)));
}
[[maybe_unused]] DECODE void signed_scales(const Bytes& b, Scale* out) {
  out[0] = make_scale(signed_column<0>(b));
  out[1] = make_scale(signed_column<1>(b));
  out[2] = make_scale(signed_column<2>(b));
  out[3] = make_scale(signed_column<3>(b));
}

// The values of IQ4_NL and IQ4_XS, -127 to 113, with an offset of 128.
alignas(16) TABLE uint8_t kIQ4Values[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
