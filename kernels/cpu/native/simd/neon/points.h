// What weights out of a grid need besides, on NEON.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

DOT I32x16 as_lanes(Bytes b) { EACH_QUARTER(I32x16, vreinterpretq_s32_u8(b.v[i])); }
DOT Bytes as_bytes(I32x16 a) { EACH_QUARTER(Bytes, vreinterpretq_u8_s32(a.v[i])); }
DOT Bytes both(Bytes a, Bytes b) { EACH_QUARTER(Bytes, vandq_u8(a.v[i], b.v[i])); }
DOT Bytes add_bytes(Bytes a, Bytes b) { EACH_QUARTER(Bytes, vaddq_u8(a.v[i], b.v[i])); }

// Both 16-bit halves of a lane, below n, become entries of the table.
template <int n>
DOT I32x16 lookup_points(const uint16_t* table, I32x16 index) {
  alignas(64) uint16_t halves[32];
  store_bytes(reinterpret_cast<uint8_t*>(halves), as_bytes(index));
  for (uint16_t& half : halves) half = table[half];
  return as_lanes(load_bytes(reinterpret_cast<const uint8_t*>(halves)));
}

// One half of each lane in both, shifted right by `bits` in the upper.
template <int bits>
DOT Bytes spread(I32x16 points, int half) {
  const I32x16 lower = half == 0 ? keep(points, 0xffff) : shift_right(points, 16);
  return as_bytes(either(lower, shift_left<16>(shift_right(lower, bits))));
}

// Bytes `offset` + x become offset - x where their bit is set, bit i for byte i.
template <int offset>
DOT Bytes with_signs(Bytes b, const uint8_t* bits) {
  const uint8x16_t one_bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)), twice = vdupq_n_u8(2 * offset & 255);
  EACH_QUARTER(Bytes, vbslq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(bits[2 * i]), vdup_n_u8(bits[2 * i + 1])), one_bit),
                       vsubq_u8(twice, b.v[i]), b.v[i]));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
