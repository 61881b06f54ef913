// What weights out of a grid need besides, in plain C++.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

DOT I32x16 as_lanes(const Bytes& b) {
  I32x16 r;
  memcpy(r.v, b.v, sizeof r.v);
  return r;
}
DOT Bytes as_bytes(const I32x16& a) {
  Bytes r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
DOT Bytes both(const Bytes& a, const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = a.v[i] & b.v[i];
  return r;
}
DOT Bytes add_bytes(const Bytes& a, const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = static_cast<uint8_t>(a.v[i] + b.v[i]);
  return r;
}

// Both 16-bit halves of a lane, below n, become entries of the table.
template <int n>
DOT I32x16 lookup_points(const uint16_t* table, const I32x16& index) {
  uint16_t halves[32];
  memcpy(halves, index.v, sizeof halves);
  for (uint16_t& half : halves) half = table[half];
  I32x16 r;
  memcpy(r.v, halves, sizeof r.v);
  return r;
}

// One half of each lane in both, shifted right by `bits` in the upper.
template <int bits>
DOT Bytes spread(const I32x16& points, int half) {
  uint32_t lanes[16];
  memcpy(lanes, points.v, sizeof lanes);
  for (uint32_t& lane : lanes) {
    const uint32_t point = half == 0 ? lane & 0xffff : lane >> 16;
    lane = point | point >> bits << 16;
  }
  Bytes r;
  memcpy(r.v, lanes, sizeof r.v);
  return r;
}

// Bytes `offset` + x become offset - x where their bit is set, bit i for byte i.
template <int offset>
DOT Bytes with_signs(const Bytes& b, const uint8_t* bits) {
  Bytes negative, r;
  for (int i = 0; i < 8; i++) {
    const uint64_t one_each = uint64_t{bits[i]} * 0x0101010101010101 & 0x8040201008040201;
    const uint64_t bytes = ((one_each + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101) * 255;
    memcpy(negative.v + 8 * i, &bytes, 8);
  }
  for (int i = 0; i < 64; i++)
    r.v[i] = static_cast<uint8_t>((b.v[i] ^ negative.v[i]) + ((2 * offset + 1) & negative.v[i]));
  return r;
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
