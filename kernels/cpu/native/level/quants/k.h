// Decoders of types with blocks of 256 columns whose sub-blocks have integer scales, and of ternary types.
#pragma once

#include "level/quants/thirds.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Q2_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 16; s and m have 4 bits.
// Body: for every four sub-blocks four lines of bit pairs, with k-group g in line g and the first sub-block in the
// lowest pairs; then four lines of k-groups over j, with s in the low and m in the high bits. Tail: scale, min.
struct Q2_K : DecoderWithMin<QuantType::Q2_K, 16, 2> {
  static constexpr bool kScaleLines = true;
  static constexpr int kTogether = 4;
  static DECODE Bytes pairs(Lines body, int j, int g) { return load_bytes(body + j / 4 * 256 + 64 * g); }
  static DECODE Bytes group(Lines body, int j, int g) { return bit_pair(pairs(body, j, g), j % 4); }
  static DECODE Bytes scale_bytes(Lines body, int i) { return field<0, 15>(load_bytes(body + 1024 + 64 * i)); }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) unsigned_scales(scale_bytes(body, i), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[4]) {
    for (int i = 0; i < 4; i++) out[i] = field<4, 15>(load_bytes(body + 1024 + 64 * i));
  }
};

// Q3_K: weight = scale * s[j] * (q - 4) in sub-block j of 16; s is six bits less 32.
// Body: three lines for each pair of the 16 sub-blocks; then three lines of k-groups over j, with six bits and two
// bits: s[0-3] and bits 0-1 of s[12-15]; s[4-7] and bits 2-3; s[8-11] and bits 4-5. Tail: scale.
struct Q3_K : Decoder<QuantType::Q3_K, 16, 3, 4> {
  static constexpr int kTogether = 2;
  static DECODE Bytes group(Lines body, int j, int g) { return three_bit_group(body + 192 * (j / 2), 4 * (j % 2) + g); }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    const Bytes a = load_bytes(body + 1536), b = load_bytes(body + 1600), c = load_bytes(body + 1664);
    unsigned_scales<32>(field<0, 63>(a), out);
    unsigned_scales<32>(field<0, 63>(b), out + 4);
    unsigned_scales<32>(field<0, 63>(c), out + 8);
    unsigned_scales<32>(merge(field<6, 3>(a), merge(field<4, 12>(b), field<2, 48>(c))), out + 12);
  }
};

// Eight scales s and eight mins m of six bits, in three lines of k-groups over j at byte `at` of the body, with six
// bits and two bits: s[0-3] and bits 0-1 of m[4-7]; s[4-7] and bits 2-3 of m[4-7]; m[0-3] and bits 4-5 of m[4-7].
template <QuantType type, int bits, int at>
struct SixBitScales : DecoderWithMin<type, 8, bits> {
  static constexpr bool kScaleLines = true;
  static DECODE Bytes scale_bytes(Lines body, int i) { return field<0, 63>(load_bytes(body + at + 64 * i)); }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) {
    for (int i = 0; i < 2; i++) unsigned_scales(scale_bytes(body, i), out + 4 * i);
  }
  static DECODE void sub_mins(Lines body, Bytes (&out)[2]) {
    const Bytes a = load_bytes(body + at), b = load_bytes(body + at + 64), c = load_bytes(body + at + 128);
    out[0] = field<0, 63>(c);
    out[1] = merge(field<6, 3>(a), merge(field<4, 12>(b), field<2, 48>(c)));
  }
};

// Q4_K: weight = scale * s[j] * q - min * m[j] in sub-block j of 32; s and m have 6 bits.
// Body: nibbles of 8 sub-blocks; then s and m. Tail: scale, min.
struct Q4_K : SixBitScales<QuantType::Q4_K, 4, 2048> {
  static DECODE Bytes group(Lines body, int j, int g) { return nibble_group(body + 256 * j, g); }
};

// Q5_K: like Q4_K, but with five lines of quants for each of the 8 sub-blocks.
struct Q5_K : SixBitScales<QuantType::Q5_K, 5, 2560> {
  static DECODE Bytes group(Lines body, int j, int g) { return five_bit_group(body + 320 * j, g); }
};

// Q6_K: weight = scale * s[j] * (q - 32) in sub-block j of 16; s is signed.
// Body: for each sub-block a line of nibbles of k-groups 0 (low) and 2 (high), one of 1 and 3, and one of bits 4-5 of
// all four; then four lines of s as k-groups over j. Tail: scale.
struct Q6_K : Decoder<QuantType::Q6_K, 16, 6, 32> {
  static constexpr bool kScaleLines = true;
  static DECODE Bytes group(Lines body, int j, int g) {
    Lines lines = body + 192 * j;
    constexpr Places low{{0, 0, 4, 4}, {15, 15, 15, 15}}, high{{-4, -2, 0, 2}, {48, 48, 48, 48}};
    return merge(field_of<low>(load_bytes(lines + 64 * (g & 1)), g), field_of<high>(load_bytes(lines + 128), g));
  }
  static DECODE void sub_scales(Lines body, Scale (&out)[16]) {
    for (int i = 0; i < 4; i++) signed_scales(load_bytes(body + 3072 + 64 * i), out + 4 * i);
  }
};

// IQ4_XS: weight = scale * s[j] * value[q] in sub-block j of 32; s is signed, the values are those of IQ4_NL.
// A segment's integers stay within 256 * 127 * 127 * 32 < 2^27.
// Body: nibbles of 8 sub-blocks; then two lines of s as k-groups over j. Tail: scale.
struct IQ4_XS : Decoder<QuantType::IQ4_XS, 8, 8, 128> {
  static constexpr bool kScaleLines = true;
  static DECODE Bytes group(Lines body, int j, int g) { return lookup(kIQ4Values, nibble_group(body + 256 * j, g)); }
  static DECODE void sub_scales(Lines body, Scale (&out)[8]) {
    for (int i = 0; i < 2; i++) signed_scales(load_bytes(body + 2048 + 64 * i), out + 4 * i);
  }
};

// TQ2_0: weight = scale * (q - 1). q is 0, 1 or 2; a 3 occurs only in files that no quantizer wrote. Sub-blocks have no
// scales.
// Body: for every 128 columns eight lines of bit pairs, with k-group i of each 32 columns in line i and the first 32
// columns in the lowest pairs. Tail: scale.
struct TQ2_0 : Decoder<QuantType::TQ2_0, 8, 2, 1> {
  static constexpr int kTogether = 4;
  static DECODE Bytes pairs(Lines body, int j, int g) { return load_bytes(body + j / 4 * 512 + 64 * g); }
  static DECODE Bytes group(Lines body, int j, int g) { return bit_pair(pairs(body, j, g), j % 4); }
};

// TQ1_0: weight = scale * (q - 1), with q = 0, 1 or 2. Body: the bit pairs as thirds. (Base-3 digits would take fewer
// bytes, but decoding them would take longer than reading these.) Tail: scale.
struct TQ1_0 : Decoder<QuantType::TQ1_0, 8, 2, 1> {
  static constexpr int kTogether = 4;
  static DECODE Bytes pairs(Lines body, int j, int g) { return thirds(body, j / 4 * 8 + g); }
  static DECODE Bytes group(Lines body, int j, int g) { return bit_pair(pairs(body, j, g), j % 4); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
