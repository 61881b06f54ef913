// What the decoders of several quant types share. A decoder tells how a segment lies in a tile (its body and tail in
// matrix.h): k-group g of sub-block j as unsigned bytes of kBits bits, each kOffset above the quant; the float scale,
// the min where the type has one, and the integer scales and mins of its sub-blocks where there is more than one.
#pragma once

#include "matrix.h"
#include "simd/dot.h"

#define DECODE inline __attribute__((always_inline))

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// k-groups of 32 columns in four lines: groups g and g + 4 are the low and high halves of line g.
[[maybe_unused]] DECODE Bytes nibble_group(const uint8_t* lines, int g) {
  const Bytes line = load_bytes(lines + 64 * (g & 3));
  return g < 4 ? field<0, 15>(line) : field<4, 15>(line);
}

[[maybe_unused]] DECODE F32x16 load_f16(const uint8_t* p) { return from_f16(reinterpret_cast<const uint16_t*>(p)); }

// The four columns of a k-group as scales per row.
[[maybe_unused]] DECODE void unsigned_scales(const Bytes& b, Scale* out) {
  out[0] = make_scale(column<0>(b));
  out[1] = make_scale(column<1>(b));
  out[2] = make_scale(column<2>(b));
  out[3] = make_scale(column<3>(b));
}
[[maybe_unused]] DECODE void signed_scales(const Bytes& b, Scale* out) {
  out[0] = make_scale(signed_column<0>(b));
  out[1] = make_scale(signed_column<1>(b));
  out[2] = make_scale(signed_column<2>(b));
  out[3] = make_scale(signed_column<3>(b));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
