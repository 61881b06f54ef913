// Decoders of the IQ types whose weights are points of a grid (pack/grids.h). Signs are a bit a weight, set where it is
// negative; sub-block scales are odd, 2 s + 1 of three or four bits.
#pragma once

#include "level/quants/decoder.h"
#include "pack/grids.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Of 256 columns. The float scale is a float16 of the file divided by `divisor`; decoding a tile again costs more than a
// panel from nine tokens on.
template <QuantType type, int sub_blocks, int bits, int offset, int divisor>
struct GridDecoder : Decoder<type, sub_blocks, bits, offset> {
  static constexpr int kDirectTokens = 8;
  static DECODE F32x16 scale(Lines tail) { return mul(load_f16(tail), broadcast(1.0f / divisor)); }
};

TABLE uint8_t kOdd[16] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};

// A line of eight scales as k-groups: s[0-3] in the low halves, s[4-7] in the high.
template <int bits = 4>
DECODE void odd_scales(Lines line, Scale* out) {
  const Bytes nibbles = load_bytes(line);
  unsigned_scales(lookup(kOdd, field<0, (1 << bits) - 1>(nibbles)), out);
  unsigned_scales(lookup(kOdd, field<4, (1 << bits) - 1>(nibbles)), out + 4);
}

// The same scales as mins: they multiply the offset of the type.
[[maybe_unused]] DECODE void odd_mins(Lines line, Bytes* out) {
  const Bytes nibbles = load_bytes(line);
  out[0] = lookup(kOdd, field<0, 15>(nibbles));
  out[1] = lookup(kOdd, field<4, 15>(nibbles));
}

// Bytes h and h + 2 of every lane as its halves.
[[maybe_unused]] DECODE I32x16 two_indices(Lines line, int h) {
  return keep(shift_right(as_lanes(load_bytes(line)), 8 * h), 0x00ff00ff);
}

// What +-8, +-25 and +-43 are above -44, by four bits: one of these levels in bits 2 * high and 2 * high + 1, and of the
// other two bits one, `sign`, that is set where it is negative.
struct SignedLevels {
  uint8_t of[2][2][16];  // [high][sign]
  constexpr SignedLevels() : of{} {
    constexpr int values[4] = {8, 25, 43, 0};
    for (int high = 0; high < 2; high++)
      for (int sign = 0; sign < 2; sign++)
        for (int i = 0; i < 16; i++) {
          const int value = values[i >> 2 * high & 3];
          of[high][sign][i] = static_cast<uint8_t>(44 + ((i >> (2 - 2 * high + sign) & 1) != 0 ? -value : value));
        }
  }
};
TABLE SignedLevels kIQ2Values;

// k-group g of 32 columns from bytes of two levels in the halves where `nibbles` has them, and a line of signs: bit
// 4 * (g % 2) + 2 * (1 - g / 2 % 2) + g / 4 is that of k-group g.
template <bool high>
DECODE Bytes iq2_group(Bytes levels, Bytes signs, int g) {
  constexpr int mask = high ? 0xcc : 0x33;
  const Bytes codes = merge(field<0, mask>(levels), field<0, 255 - mask>(signs));
  return lookup(kIQ2Values.of[high][g / 4], g % 2 == 0 ? field<0, 15>(codes) : field<4, 15>(codes));
}

// k-group g of 32 columns of which a pair of points has eight each. Spread, a point has the levels of columns 0 to 3 in the
// low halves of its bytes and those of columns 4 to 7 in the high.
[[maybe_unused]] DECODE Bytes iq2_group(Points points, Lines line, int g) {
  const Bytes signs = load_bytes(line);
  return iq2_group<false>(spread<2>(points, g / 2 % 2), g / 2 % 2 == 0 ? signs : field<-2, 0xcc>(signs), g);
}

// IQ2_XXS: weight = scale / 8 * s[j] * +-v in sub-block j of 32, v one of three.
// Body: the indices of four points as bytes 0, 2, 1, 3 of line j; signs; s. Tail: scale.
struct IQ2_XXS : GridDecoder<QuantType::IQ2_XXS, 8, 7, 44, 8> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const Points points = lookup_points<256>(kIQ2_XXSGrid.point, two_indices(body + 64 * j, g / 4));
    return iq2_group(points, body + 512 + 64 * j, g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 1024, out); }
  static DECODE void sub_mins(Lines body, Bytes (&out)[2]) { odd_mins(body + 1024, out); }
};

// IQ2_XS: weight = scale / 8 * s[j] * +-v in sub-block j of 16, v one of three.
// Body: low bytes of the indices of the points of 32 columns as bytes 0, 2, 1, 3 of a line; a line of their ninth bits,
// of sub-block j bits j and 16 + j of each lane; signs; two lines of s. Tail: scale.
struct IQ2_XS : GridDecoder<QuantType::IQ2_XS, 16, 7, 44, 8> {
  static constexpr int kTogether = 2;
  static DECODE Bytes group(Lines body, int j, int g) {
    const I32x16 ninth = keep(shift_right(as_lanes(load_bytes(body + 512)), j), 0x00010001);
    const I32x16 index = either(two_indices(body + j / 2 * 64, j % 2), shift_left<8>(ninth));
    const Points points = lookup_points<512>(kIQ2_XSGrid.point, index);
    return iq2_group(points, body + 576 + j / 2 * 64, j % 2 * 4 + g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales(body + 1088, out);
    odd_scales(body + 1152, out + 8);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    odd_mins(body + 1088, out);
    odd_mins(body + 1152, out + 2);
  }
};

TABLE uint8_t kIQ3Values[16] = {128 + 2, 128 + 6, 128 + 10, 128 + 14, 128 + 18, 128 + 22, 128 + 26, 128 + 31};

// IQ3_XXS: weight = scale / 2 * s[j] * +-v in sub-block j of 32, v one of eight.
// Body: the indices of four points as bytes 0, 2, 1, 3 of a line; signs; s. Tail: scale.
struct IQ3_XXS : GridDecoder<QuantType::IQ3_XXS, 8, 8, 128, 2> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const I32x16 index = two_indices(body + 128 * j + g / 4 * 64, g / 2 % 2);
    const Bytes levels = spread<4>(lookup_points<256>(kIQ3_XXSGrid.point, index), g % 2);
    return with_signs<kOffset>(lookup(kIQ3Values, levels), body + 1024 + 64 * j + 8 * g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 1536, out); }
};

// IQ3_S: weight = scale * s[j] * (2 n - 15) in sub-block j of 32, its grid resolved: every level with its sign is four
// bits. Body: nibbles of 8 sub-blocks; s. Tail: scale.
struct IQ3_S : Decoder<QuantType::IQ3_S, 8, 5, 16> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const Bytes line = load_bytes(body + 256 * j + 64 * (g & 3));
    return merge(g < 4 ? field<-1, 30>(line) : field<3, 30>(line), as_bytes(broadcast(0x01010101)));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 2048, out); }
};

// Weights of three levels whose grid is resolved, in seven bits for a column of four k-groups: places in four, what is
// around them in three (pack/grids.h). Of 128 columns four lines of places, 16 columns in the low halves and 16 in the high,
// then three of the others.
constexpr int kThirdsBytes = 14 * 64;

// The levels of the four k-groups of 16 columns: 0, 2, 1 and 3 from the lowest bits on.
[[maybe_unused]] DECODE Bytes thirds(Lines lines, int j) {
  const Bytes places = load_bytes(lines + j / 8 * 448 + j % 8 / 2 * 64);
  const Bytes place = lookup(kThirdsPlace, j % 2 == 0 ? field<0, 15>(places) : field<4, 15>(places));
  return add_bytes(place, lookup(kThirdsAround, three_bit_group(lines + j / 8 * 448 + 256, j % 8)));
}

// IQ2_S: weight = scale / 8 * s[j] * +-v in sub-block j of 16, v one of three.
// Body: thirds; signs; two lines of s. Tail: scale.
struct IQ2_S : GridDecoder<QuantType::IQ2_S, 16, 7, 44, 8> {
  static constexpr int kTogether = 8;
  static DECODE Bytes group(Lines body, int j, int g) {
    const Bytes levels = thirds(body, j), signs = load_bytes(body + kThirdsBytes + j / 2 * 64);
    return g < 2 ? iq2_group<false>(levels, signs, j % 2 * 4 + g) : iq2_group<true>(levels, signs, j % 2 * 4 + g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales(body + 1408, out);
    odd_scales(body + 1472, out + 8);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    odd_mins(body + 1408, out);
    odd_mins(body + 1472, out + 2);
  }
};

// IQ1: eight times a level of -1, 0 or 1, and one less or more than it, plus 16; `up` has 0 or 1 in each lane.
[[maybe_unused]] DECODE Bytes iq1_group(Lines lines, I32x16 up, int j, int g) {
  constexpr Places eightfold{{-3, 1, -1, 3}, {24, 24, 24, 24}};
  const I32x16 more = add(broadcast(0x07070707), keep(sub(broadcast(0), up), 0x02020202));
  return add_bytes(field_of<eightfold>(thirds(lines, j), g), as_bytes(more));
}

// The scales 2 s + 1 of IQ1_S times eight, and what is subtracted for each: nine times it, or seven times where the bit
// above s is set. The latter in two terms, since 135 has too many bits.
TABLE uint8_t kIQ1Eightfold[16] = {8, 24, 40, 56, 72, 88, 104, 120, 8, 24, 40, 56, 72, 88, 104, 120};
TABLE uint8_t kIQ1Sevenfold[16] = {7, 21, 35, 49, 63, 77, 91, 105, 7, 21, 35, 49, 63, 77, 91, 105};
TABLE uint8_t kIQ1Twofold[16] = {2, 6, 10, 14, 18, 22, 26, 30};

// IQ1_S as products take it: weight = scale / 8 * (8 s[j] * l - m[j]) in sub-block j of 32, l 0, 1 or 2.
struct IQ1_SLevels : GridDecoder<QuantType::IQ1_S, 8, 2, 1, 8> {
  static constexpr int kTogether = 4, kMinLines = 4;
  static DECODE Bytes group(Lines body, int j, int g) {
    constexpr Places pairs{{0, 4, 2, 6}, {3, 3, 3, 3}};
    return field_of<pairs>(thirds(body, 2 * j + g / 4), g % 4);
  }
  static DECODE Bytes half_of(Lines body, int i) {
    const Bytes line = load_bytes(body + kThirdsBytes);
    return i == 0 ? field<0, 15>(line) : field<4, 15>(line);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) {
    for (int i = 0; i < 2; i++) unsigned_scales(lookup(kIQ1Eightfold, half_of(body, i)), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    for (int i = 0; i < 2; i++) out[i] = lookup(kIQ1Sevenfold, half_of(body, i));
    for (int i = 0; i < 2; i++) out[2 + i] = lookup(kIQ1Twofold, half_of(body, i));
  }
};

// IQ1_S: weight = scale / 8 * s[j] * (8 v +- 1) in sub-block j of 16 columns (s and the sign of 1 of 32), v -1, 0 or 1.
// Body: thirds; a line of s in three bits, above them a bit that is set for + 1. Tail: scale.
struct IQ1_S : GridDecoder<QuantType::IQ1_S, 16, 5, 16, 8> {
  using InProducts = IQ1_SLevels;
  static DECODE Bytes group(Lines body, int j, int g) {
    const int i = j / 2;
    const I32x16 up = keep(shift_right(as_lanes(load_bytes(body + kThirdsBytes)), i % 4 * 8 + i / 4 * 4 + 3), 1);
    return iq1_group(body, up, j, g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    Scale of_32[8];
    odd_scales<3>(body + kThirdsBytes, of_32);
    UNROLL for (int j = 0; j < 16; j++) out[j] = of_32[j / 2];
  }
};

// IQ1_M: weight = scale / 8 * s[j] * (8 v +- 1) in sub-block j of 16 (the sign of 1 of eight columns), v -1, 0 or 1.
// Body: thirds; two lines of s in three bits, above them a bit that is set for + 1 in the first eight columns; such bits
// of the other eight, 16 of each row; scale.
struct IQ1_M : GridDecoder<QuantType::IQ1_M, 16, 5, 16, 8> {
  static constexpr int kTogether = 8;
  static DECODE Bytes group(Lines body, int j, int g) { return iq1_group(body, up(body, j, g / 2), j, g); }
  static DECODE I32x16 up(Lines body, int j, int eight) {
    Lines lines = body + kThirdsBytes;
    const int place = j % 4 * 8 + j % 8 / 4 * 4 + 3;
    if (eight == 0) return keep(shift_right(as_lanes(load_bytes(lines + j / 8 * 64)), place), 1);
    const I32x16 upper_halves = float_to_bits(from_bf16(halves(lines + 128)));
    return keep(shift_right(upper_halves, 16 + j), 1);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales<3>(body + kThirdsBytes, out);
    odd_scales<3>(body + kThirdsBytes + 64, out + 8);
  }
  static DECODE F32x16 scale(Lines tail) { return GridDecoder::scale(tail - 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
