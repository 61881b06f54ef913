// Decoders of the IQ types whose weights are points of a grid (pack/grids.h). A weight has a sign bit, which is set for
// a negative weight. Sub-block scales are odd: 2 s + 1, with s of three or four bits.
#pragma once

#include "level/quants/signed_levels.h"
#include "level/quants/thirds.h"
#if defined(LLAMACLUST_BYTE_LOOKUPS)
#include "level/quants/points_by_bytes.h"
#elif defined(LLAMACLUST_ROW_LOOKUPS)
#include "level/quants/points_by_rows.h"
#else
#include "level/quants/points_by_words.h"
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// A type with 256 columns per segment. The float scale is a float16 of the file divided by `divisor`. From nine tokens
// on, a panel costs less than decoding tiles again.
template <QuantType type, int sub_blocks, int bits, int offset, int divisor>
struct GridDecoder : Decoder<type, sub_blocks, bits, offset> {
  static constexpr int kDirectTokens = 8;
  static DECODE F32x16 scale(Lines tail) { return mul(load_f16(tail), broadcast(1.0f / divisor)); }
};

// Looks up four of the eight four-bit numbers in each lane of a line, the low or the high nibbles, as a k-group.
[[maybe_unused]] DECODE Bytes four_scales(const uint8_t (&table)[16], Lines line, int half) {
  const Bytes nibbles = load_bytes(line);
  return lookup(table, half == 0 ? field<0, 15>(nibbles) : field<4, 15>(nibbles));
}

TABLE uint8_t kOdd[16] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
TABLE uint8_t kThreeBitOdd[16] = {1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15};

// A type with lines of odd scales in its body, at byte `at`. Its mins are the same scales, which products multiply with
// the offset.
template <QuantType type, int sub_blocks, int bits, int offset, int divisor, int at>
struct OddScaled : GridDecoder<type, sub_blocks, bits, offset, divisor> {
  static DECODE void sub_scales(Lines body, Scale (&out)[sub_blocks]) {
    for (int i = 0; i < sub_blocks / 4; i++) unsigned_scales(four_scales(kOdd, body + at + i / 2 * 64, i % 2), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[sub_blocks / 4]) {
    for (int i = 0; i < sub_blocks / 4; i++) out[i] = four_scales(kOdd, body + at + i / 2 * 64, i % 2);
  }
};

// IQ2_XXS: weight = scale / 8 * s[j] * +-v in sub-block j of 32; v is one of three values.
// Body: the indices of four points as bytes 0, 2, 1, 3 of line j; signs; s. Tail: scale.
struct IQ2_XXS : OddScaled<QuantType::IQ2_XXS, 8, 7, 44, 8, 1024> {
  static DECODE Bytes group(Lines body, int j, int g) {
    return iq2_points(kIQ2_XXSGrid, body + 64 * j, body + 512 + 64 * j, g);
  }
};

// IQ2_XS: weight = scale / 8 * s[j] * +-v in sub-block j of 16; v is one of three values.
// Body: low bytes of the indices of the points of 32 columns as bytes 0, 2, 1, 3 of a line; a line of their ninth bits,
// bit i for line i; signs; two lines of s. Tail: scale.
struct IQ2_XS : OddScaled<QuantType::IQ2_XS, 16, 7, 44, 8, 1088> {
  static constexpr int kTogether = 2;
  using Body = NineBitPoints;
  static DECODE Bytes group(const Body& body, int j, int g) {
    return iq2_points(kIQ2_XSGrid, body, j / 2, j % 2 * 4 + g);
  }
};

// IQ3_XXS: weight = scale / 2 * s[j] * +-v in sub-block j of 32; v is one of eight values.
// Body: the indices of four points as bytes 0, 2, 1, 3 of a line; signs in the order of a k-group's bytes, 8 bytes a
// k-group; s. Tail: scale.
struct IQ3_XXS : OddScaled<QuantType::IQ3_XXS, 8, 6, 32, 2, 1536> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const Bytes values = iq3_points(kIQ3_XXSGrid, body + 128 * j + g / 4 * 64, g % 4);
    return with_signs<kOffset>(values, body + 1024 + 64 * j + 8 * g);
  }
};

// IQ3_S: weight = scale * s[j] * (2 n - 15) in sub-block j of 32. Packing resolves the grid: n, four bits, is a level
// with its sign. Body: nibbles of 8 sub-blocks; s. Tail: scale.
struct IQ3_S : Decoder<QuantType::IQ3_S, 8, 5, 16> {
  static DECODE Bytes group(Lines body, int j, int g) {
    const Bytes line = load_bytes(body + 256 * j + 64 * (g & 3));
    return merge(g < 4 ? field<-1, 30>(line) : field<3, 30>(line), as_bytes(broadcast(0x01010101)));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) {
    for (int i = 0; i < 2; i++) unsigned_scales(four_scales(kOdd, body + 2048, i), out + 4 * i);
  }
};

// IQ2_S: weight = scale / 8 * s[j] * +-v in sub-block j of 16; v is one of three values.
// Body: the points as thirds of sub-blocks, with k-groups 0, 2, 1 and 3 in the pairs; signs; two lines of s. Tail:
// scale.
struct IQ2_S : OddScaled<QuantType::IQ2_S, 16, 7, 44, 8, 1408> {
  static constexpr int kTogether = 8;
  static DECODE Bytes group(Lines body, int j, int g) {
    const Bytes levels = thirds(body, j), signs = load_bytes(body + kThirdsBytes + j / 2 * 64);
    return g < 2 ? iq2_group<false>(levels, signs, j % 2 * 4 + g) : iq2_group<true>(levels, signs, j % 2 * 4 + g);
  }
};

// IQ1 weights are scale / 8 * s[j] * (8 v +- 1), with v = -1, 0 or 1. With f = 4 (v + 1), plus 1 if the sign is +, 8 v
// +- 1 is 2 f - 9. Products use f; single weights are bytes 2 f + 7, which is 16 too large. `up` is 1 in lanes with the
// sign +, else 0.
[[maybe_unused]] DECODE Bytes four_thirds(Lines lines, I32x16 up, int j, int g) {
  constexpr Places fourfold{{-2, 2, 0, 4}, {12, 12, 12, 12}};
  return merge(field_of<fourfold>(thirds(lines, j), g), as_bytes(keep(sub(broadcast(0), up), 0x01010101)));
}
[[maybe_unused]] DECODE Bytes iq1_weights(Bytes fours) {
  return add_bytes(add_bytes(fours, fours), as_bytes(broadcast(0x07070707)));
}

TABLE uint8_t kTwiceOdd[16] = {2, 6, 10, 14, 18, 22, 26, 30, 2, 6, 10, 14, 18, 22, 26, 30};
TABLE uint8_t kEightTimesOdd[16] = {8, 24, 40, 56, 72, 88, 104, 120, 8, 24, 40, 56, 72, 88, 104, 120};

// Tables indexed by the four bits of an IQ1_S scale: seven times the scale; and twice the scale, or 0 if the highest
// bit is set.
TABLE uint8_t kSevenTimesOdd[16] = {7, 21, 35, 49, 63, 77, 91, 105, 7, 21, 35, 49, 63, 77, 91, 105};
TABLE uint8_t kTwiceOddDown[16] = {2, 6, 10, 14, 18, 22, 26, 30};

// IQ1_S in products: scale / 8 * (8 s[j] * (v + 1) - m[j]) in sub-block j of 32, with m[j] nine or seven times s[j].
struct IQ1_SProducts : GridDecoder<QuantType::IQ1_S, 8, 2, 1, 8> {
  static constexpr int kTogether = 4, kMinLines = 4;
  static DECODE Bytes pairs(Lines body, int j, int g) { return thirds(body, j / 4 * 8 + g); }
  static DECODE Bytes group(Lines body, int j, int g) { return bit_pair(pairs(body, j, g), j % 4); }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) {
    for (int i = 0; i < 2; i++) unsigned_scales(four_scales(kEightTimesOdd, body + kThirdsBytes, i), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    for (int i = 0; i < 2; i++) {
      out[i] = four_scales(kSevenTimesOdd, body + kThirdsBytes, i);
      out[2 + i] = four_scales(kTwiceOddDown, body + kThirdsBytes, i);
    }
  }
};

// IQ1_S: weight = scale / 8 * s[j] * (8 v +- 1), with v = -1, 0 or 1, in sub-block j of 16 columns; s and the sign are
// equal in pairs of sub-blocks. Body: thirds, which combine k-group i of each 32 of 128 columns; a line of s in three
// bits, with a fourth bit that is set for +1. Tail: scale.
struct IQ1_S : GridDecoder<QuantType::IQ1_S, 16, 5, 16, 8> {
  using InProducts = IQ1_SProducts;
  static DECODE Bytes group(Lines body, int j, int g) {
    const int i = j / 2;
    const I32x16 up = keep(shift_right(as_lanes(load_bytes(body + kThirdsBytes)), i % 4 * 8 + i / 4 * 4 + 3), 1);
    const Bytes levels = IQ1_SProducts::group(body, i, j % 2 * 4 + g);
    return iq1_weights(merge(field<-2, 12>(levels), as_bytes(keep(sub(broadcast(0), up), 0x01010101))));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    Scale of_32[8];
    for (int i = 0; i < 2; i++) unsigned_scales(four_scales(kThreeBitOdd, body + kThirdsBytes, i), of_32 + 4 * i);
    UNROLL for (int j = 0; j < 16; j++) out[j] = of_32[j / 2];
  }
};

// IQ1_M: weight = scale / 8 * s[j] * (8 v +- 1), with v = -1, 0 or 1, in sub-block j of 16; the sign belongs to eight
// columns. Body: thirds as in IQ2_S; two lines of s in three bits, with a fourth bit that is set for +1 in the first
// eight columns; 16 such bits of each row for the other eight columns; scale.
[[maybe_unused]] DECODE Bytes iq1_m_group(Lines body, int j, int g) {
  Lines lines = body + kThirdsBytes;
  const int place = j % 4 * 8 + j % 8 / 4 * 4 + 3;
  if (g < 2) {
    const I32x16 up = keep(shift_right(as_lanes(load_bytes(lines + j / 8 * 64)), place), 1);
    return four_thirds(body, up, j, g);
  }
  const I32x16 upper_halves = float_to_bits(from_bf16(halves(lines + 128)));
  return four_thirds(body, keep(shift_right(upper_halves, 16 + j), 1), j, g);
}

struct IQ1_MProducts : GridDecoder<QuantType::IQ1_M, 16, 4, 9, 8> {
  static constexpr int kTogether = 8;
  static DECODE Bytes group(Lines body, int j, int g) { return iq1_m_group(body, j, g); }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) unsigned_scales(four_scales(kTwiceOdd, body + kThirdsBytes + i / 2 * 64, i % 2), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    for (int i = 0; i < 4; i++) out[i] = four_scales(kThreeBitOdd, body + kThirdsBytes + i / 2 * 64, i % 2);
  }
  static DECODE F32x16 scale(Lines tail) { return GridDecoder::scale(tail - 32); }
};

struct IQ1_M : GridDecoder<QuantType::IQ1_M, 16, 5, 16, 8> {
  using InProducts = IQ1_MProducts;
  static DECODE Bytes group(Lines body, int j, int g) { return iq1_weights(iq1_m_group(body, j, g)); }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++)
      unsigned_scales(four_scales(kThreeBitOdd, body + kThirdsBytes + i / 2 * 64, i % 2), out + 4 * i);
  }
  static DECODE F32x16 scale(Lines tail) { return GridDecoder::scale(tail - 32); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
