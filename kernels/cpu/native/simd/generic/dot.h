// Integer dot products in plain C++: pairs of columns in 16 bits, loops that a compiler turns into whatever there is.
#pragma once

#include "simd/dot_int16.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Bytes {
  uint8_t v[64];
};
struct Sums {
  int16_t v[32];  // [row][columns 0 and 1, columns 2 and 3]
};
using Scale = I32x16;

constexpr int kPanelRows = 1, kPanelTokens = 4;
constexpr int kFloatRows = 1, kFloatTokens = 4;
template <int kBits>
constexpr int kDirectTokens = 16;

DOT Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
DOT void store_bytes(uint8_t* p, const Bytes& b) { memcpy(p, b.v, sizeof b.v); }
template <int shift, int mask>
DOT Bytes field(const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++)
    r.v[i] = static_cast<uint8_t>((shift >= 0 ? b.v[i] >> (shift & 7) : b.v[i] << (-shift & 7)) & mask);
  return r;
}
DOT Bytes merge(const Bytes& a, const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = a.v[i] | b.v[i];
  return r;
}
DOT Bytes lookup(const uint8_t (&table)[16], const Bytes& b) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = table[b.v[i] & 15];
  return r;
}
template <int n>
DOT I32x16 column(const Bytes& b) {
  I32x16 r;
  for (int i = 0; i < 16; i++) r.v[i] = b.v[4 * i + n];
  return r;
}
template <int n>
DOT I32x16 signed_column(const Bytes& b) {
  I32x16 r;
  for (int i = 0; i < 16; i++) r.v[i] = static_cast<int8_t>(b.v[4 * i + n]);
  return r;
}

DOT Sums no_sums() { return {}; }
// Bytes 0 and 2, or 1 and 3, of four activations as every pair's factors.
DOT void broadcast_pair(int32_t even, int16_t (&out)[32]) {
  const int32_t low = static_cast<int8_t>(even), high = static_cast<int8_t>(even >> 16);
  const uint32_t pair = (static_cast<uint32_t>(low) & 0xffff) | static_cast<uint32_t>(high) << 16;
  uint32_t pairs[16];
  for (int i = 0; i < 16; i++) pairs[i] = pair;
  memcpy(out, pairs, sizeof out);
}
template <int kBits>
DOT int16_t low_byte(uint16_t pair) {
  return kBits == 8 ? static_cast<int8_t>(pair ^ 0x80) : static_cast<int16_t>(pair & 255);
}
template <int kBits>
DOT Sums step(const Sums& sums, const Bytes& w, int32_t activations) {
  uint16_t pairs[32];
  int16_t first[32], second[32];
  memcpy(pairs, w.v, sizeof pairs);
  broadcast_pair(activations, first);
  broadcast_pair(activations >> 8, second);
  Sums r;
  for (int i = 0; i < 32; i++)
    r.v[i] = static_cast<int16_t>(sums.v[i] + low_byte<kBits>(pairs[i]) * first[i] +
                                  low_byte<kBits>(static_cast<uint16_t>(pairs[i] >> 8)) * second[i]);
  return r;
}
DOT I32x16 in_lanes(const Sums& sums) {
  I32x16 pairs, r;
  memcpy(pairs.v, sums.v, sizeof pairs);
  for (int i = 0; i < 16; i++) r.v[i] = static_cast<int16_t>(pairs.v[i]) + (pairs.v[i] >> 16);
  return r;
}
DOT I32x16 add_sums(const I32x16& total, const Sums& sums) { return add(total, in_lanes(sums)); }
DOT Scale make_scale(const I32x16& scale) { return scale; }
DOT I32x16 scale_lanes(const Scale& scale) { return scale; }
DOT I32x16 add_scaled(const I32x16& total, const Sums& sums, const Scale& scale) {
  return add(total, mul(in_lanes(sums), scale));
}
// total + scale * (sums - offset); offset is even.
DOT I32x16 add_scaled(const I32x16& total, const Sums& sums, int32_t offset, const Scale& scale) {
  return add(total, mul(sub(in_lanes(sums), broadcast(offset)), scale));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
