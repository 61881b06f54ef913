// Decoders of the IQ types whose weights are points of a grid (pack/grids.h). Signs are a bit a weight in the order of a
// k-group's bytes, 8 bytes a k-group, set where it is negative; sub-block scales are odd, 2 s + 1 of three or four bits.
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

// Bytes h and h + 2 of every lane as its halves.
[[maybe_unused]] DECODE I32x16 two_indices(Lines line, int h) {
  return keep(shift_right(as_lanes(load_bytes(line)), 8 * h), 0x00ff00ff);
}

// Magnitudes of the three levels of IQ2 types, plus 128: less it, a byte is signed.
TABLE uint8_t kIQ2Values[16] = {128 + 8, 128 + 25, 128 + 43};

// k-group g of two points, eight weights each. Spread and masked, a point has the levels of columns 0 to 3 in the low
// halves of its bytes and those of columns 4 to 7 in the high.
[[maybe_unused]] DECODE Bytes iq2_group(Points points, Lines signs, int g) {
  const Bytes levels = field<0, 0x33>(spread<2>(points, g / 2));
  return with_signs<128>(lookup(kIQ2Values, g % 2 == 0 ? levels : field<4, 3>(levels)), signs + 8 * g);
}

// IQ2_XXS: weight = scale / 8 * s[j] * +-v in sub-block j of 32, v one of three.
// Body: the indices of four points as bytes 0, 2, 1, 3 of line j; signs; s. Tail: scale.
struct IQ2_XXS : GridDecoder<QuantType::IQ2_XXS, 8, 8, 128, 8> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const Points points = lookup_points<256>(kIQ2_XXSGrid.point, two_indices(body + 64 * j, g / 4));
    return iq2_group(points, body + 512 + 64 * j + g / 4 * 32, g % 4);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) { odd_scales(body + 1024, out); }
};

// IQ2_XS: weight = scale / 8 * s[j] * +-v in sub-block j of 16, v one of three.
// Body: low bytes of the indices of the points of 32 columns as bytes 0, 2, 1, 3 of a line; a line of their ninth bits,
// of sub-block j bits j and 16 + j of each lane; signs; two lines of s. Tail: scale.
struct IQ2_XS : GridDecoder<QuantType::IQ2_XS, 16, 8, 128, 8> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const I32x16 ninth = keep(shift_right(as_lanes(load_bytes(body + 512)), j), 0x00010001);
    const I32x16 index = either(two_indices(body + j / 2 * 64, j % 2), shift_left<8>(ninth));
    return iq2_group(lookup_points<512>(kIQ2_XSGrid.point, index), body + 576 + 32 * j, g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales(body + 1088, out);
    odd_scales(body + 1152, out + 8);
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

// Weights of three levels whose grid is resolved, in seven bits for a column of the four k-groups of a sub-block. With
// a = level 0 + 3 * level 1 and b = level 2 + 3 * level 3, both up to 8, they are four bits n and three bits m:
// n = b, m = a where a < 8; else n = 9, m = b where b < 8; else n = 10, m = 0.
// Lines of n for two sub-blocks each, then of bits 0-1 of m for four, then of bit 2 for eight; the first lowest.
constexpr int kThirdsBytes = 14 * 64;

// a of k-groups 0 and 1 or b of 2 and 3; numbers above 8 stand for 8.
[[maybe_unused]] DECODE Bytes pair_of_levels(Lines lines, int j, int g) {
  constexpr uint8_t a_of_n[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 8};
  constexpr uint8_t b_of_n[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 8};
  constexpr uint8_t m_is_b[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0};
  const auto bits = [&](int line, int shift, int32_t mask) {
    return keep(shift_right(as_lanes(load_bytes(lines + 64 * line)), shift), mask);
  };
  const Bytes n = as_bytes(bits(j / 2, j % 2 * 4, 0x0f0f0f0f));
  const I32x16 low = bits(8 + j / 4, j % 4 * 2, 0x03030303), high = bits(12 + j / 8, j % 8, 0x01010101);
  const Bytes m = as_bytes(either(low, shift_left<2>(high)));
  if (g < 2) return merge(m, lookup(a_of_n, n));
  return merge(lookup(b_of_n, n), both(m, lookup(m_is_b, n)));
}

// The bytes x, y and z that levels 0, 1 and 2 stand for, by pairs of levels.
struct Thirds {
  uint8_t first[16], second[16];
  constexpr Thirds(uint8_t x, uint8_t y, uint8_t z)
      : first{x, y, z, x, y, z, x, y, z, z, z, z, z, z, z, z}, second{x, x, x, y, y, y, z, z, z, z, z, z, z, z, z, z} {}
};

// k-group g of sub-block j.
[[maybe_unused]] DECODE Bytes thirds_group(const Thirds& values, Lines lines, int j, int g) {
  return lookup(g % 2 == 0 ? values.first : values.second, pair_of_levels(lines, j, g));
}

TABLE Thirds kIQ2Thirds{128 + 8, 128 + 25, 128 + 43};

// IQ2_S: weight = scale / 8 * s[j] * +-v in sub-block j of 16, v one of three.
// Body: thirds; signs; two lines of s. Tail: scale.
struct IQ2_S : GridDecoder<QuantType::IQ2_S, 16, 8, 128, 8> {
  static DECODE Bytes group(Lines body, int j, int g) {
    return with_signs<kOffset>(thirds_group(kIQ2Thirds, body, j, g), body + kThirdsBytes + 32 * j + 8 * g);
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    odd_scales(body + 1408, out);
    odd_scales(body + 1472, out + 8);
  }
};

// IQ1: eight times a level of -1, 0 or 1, and one less or more than it, plus 16; `up` has 0 or 1 in each lane.
TABLE Thirds kIQ1Values{7, 15, 23};
[[maybe_unused]] DECODE Bytes iq1_group(Lines lines, I32x16 up, int j, int g) {
  return add_bytes(thirds_group(kIQ1Values, lines, j, g), as_bytes(keep(sub(broadcast(0), up), 0x02020202)));
}

// IQ1_S: weight = scale / 8 * s[j] * (8 v +- 1) in sub-block j of 16 columns (s and the sign of 1 of 32), v -1, 0 or 1.
// Body: thirds; a line of s in three bits, above them a bit that is set for + 1. Tail: scale.
struct IQ1_S : GridDecoder<QuantType::IQ1_S, 16, 5, 16, 8> {
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
