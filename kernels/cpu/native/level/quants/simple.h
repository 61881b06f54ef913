// Decoders of types with blocks of 32 columns: a scale, in some types a min, and quants that are used directly or
// looked up.
#pragma once

#include "level/quants/decoder.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Q4_0: weight = scale * (q - 8). Body: nibbles; tail: scale.
struct Q4_0 : Decoder<QuantType::Q4_0, 1, 4, 8> {
  static DECODE Bytes group(Lines body, int, int g) { return nibble_group(body, g); }
};

// Q4_1: weight = scale * q + min. Body: nibbles; tail: scale, min.
struct Q4_1 : DecoderWithMin<QuantType::Q4_1, 1, 4> {
  static DECODE Bytes group(Lines body, int, int g) { return nibble_group(body, g); }
};

// Q5_0: weight = scale * (q - 16). Body: five lines of quants; tail: scale.
struct Q5_0 : Decoder<QuantType::Q5_0, 1, 5, 16> {
  static DECODE Bytes group(Lines body, int, int g) { return five_bit_group(body, g); }
};

// Q5_1: weight = scale * q + min. Body: five lines of quants; tail: scale, min.
struct Q5_1 : DecoderWithMin<QuantType::Q5_1, 1, 5> {
  static DECODE Bytes group(Lines body, int, int g) { return five_bit_group(body, g); }
};

// Q8_0: weight = scale * (q - 128). Body: one line per k-group; tail: scale.
struct Q8_0 : Decoder<QuantType::Q8_0, 1, 8, 128> {
  static DECODE Bytes group(Lines body, int, int g) { return load_bytes(body + 64 * g); }
};

// IQ4_NL: weight = scale * value[q], with sixteen values in uneven steps. Body: nibbles; tail: scale.
struct IQ4_NL : Decoder<QuantType::IQ4_NL, 1, 8, 128> {
  static DECODE Bytes group(Lines body, int, int g) { return lookup(kIQ4Values, nibble_group(body, g)); }
};

// 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, with an offset of 12. They are below 25, so five bits suffice.
alignas(16) TABLE uint8_t kFP4Values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// MXFP4: weight = scale * value[q]. The values are twice those of E2M1, so the scale is 2^(e - 128). Body: nibbles;
// tail: e, one byte per row.
struct MXFP4 : Decoder<QuantType::MXFP4, 1, 5, 12> {
  static DECODE Bytes group(Lines body, int, int g) { return lookup(kFP4Values, nibble_group(body, g)); }
  static DECODE F32x16 scale(Lines tail) { return from_halved_e8m0(tail); }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
