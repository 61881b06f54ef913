// Integer dot products in plain C++, as sums of column pairs in 16 bits. The compiler vectorizes the loops for any CPU.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Bytes {
  uint8_t v[64];
};
struct Sums {
  int16_t v[32];  // [row][columns 0 and 1, columns 2 and 3]
};
using Scale = I32x16;

constexpr int kPanelRows = 1, kPanelTokens = 4, kDirectWidth = 4;
constexpr int kFloatRows = 1, kFloatTokens = 4;
template <int kBits>
constexpr int kDirectTokens = 16;

INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
INLINE void store_bytes(uint8_t* p, const Bytes& b) { memcpy(p, b.v, sizeof b.v); }
template <int shift, int mask>
INLINE Bytes field(const Bytes& b) {
  EACH(Bytes, static_cast<uint8_t>((shift >= 0 ? b.v[i] >> (shift & 7) : b.v[i] << (-shift & 7)) & mask));
}
INLINE Bytes merge(const Bytes& a, const Bytes& b) { EACH(Bytes, a.v[i] | b.v[i]); }
INLINE Bytes lookup(const uint8_t (&table)[16], const Bytes& b) { EACH(Bytes, table[b.v[i] & 15]); }
template <int n>
INLINE I32x16 column(const Bytes& b) { EACH(I32x16, b.v[4 * i + n]); }
template <int n>
INLINE I32x16 signed_column(const Bytes& b) { EACH(I32x16, static_cast<int8_t>(b.v[4 * i + n])); }

INLINE Sums no_sums() { return {}; }
// Repeats bytes 0 and 2 of `even` as the two factors of every column pair.
INLINE void broadcast_pair(int32_t even, int16_t (&out)[32]) {
  const int32_t low = static_cast<int8_t>(even), high = static_cast<int8_t>(even >> 16);
  const uint32_t pair = (static_cast<uint32_t>(low) & 0xffff) | static_cast<uint32_t>(high) << 16;
  uint32_t pairs[16];
  for (int i = 0; i < 16; i++) pairs[i] = pair;
  memcpy(out, pairs, sizeof out);
}
template <int kBits>
INLINE int16_t low_byte(uint16_t pair) {
  return kBits == 8 ? static_cast<int8_t>(pair ^ 0x80) : static_cast<int16_t>(pair & 255);
}
template <int kBits>
INLINE Sums step(const Sums& sums, const Bytes& w, int32_t activations) {
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
INLINE I32x16 in_lanes(const Sums& sums) {
  I32x16 pairs, r;
  memcpy(pairs.v, sums.v, sizeof pairs);
  for (int i = 0; i < 16; i++) r.v[i] = static_cast<int16_t>(pairs.v[i]) + (pairs.v[i] >> 16);
  return r;
}
INLINE I32x16 add_sums(const I32x16& total, const Sums& sums) { return add(total, in_lanes(sums)); }
INLINE Scale make_scale(const I32x16& scale) { return scale; }
INLINE I32x16 scale_lanes(const Scale& scale) { return scale; }
INLINE I32x16 add_scaled(const I32x16& total, const Sums& sums, const Scale& scale) {
  return add(total, mul(in_lanes(sums), scale));
}
// Returns total + scale * (sums - offset). `offset` is even.
INLINE I32x16 add_scaled(const I32x16& total, const Sums& sums, int32_t offset, const Scale& scale) {
  return add(total, mul(sub(in_lanes(sums), broadcast(offset)), scale));
}

INLINE I32x16 as_lanes(const Bytes& b) { return __builtin_bit_cast(I32x16, b); }
INLINE Bytes as_bytes(const I32x16& a) { return __builtin_bit_cast(Bytes, a); }
INLINE Bytes both(const Bytes& a, const Bytes& b) { EACH(Bytes, a.v[i] & b.v[i]); }
INLINE Bytes add_bytes(const Bytes& a, const Bytes& b) { EACH(Bytes, static_cast<uint8_t>(a.v[i] + b.v[i])); }

template <int offset>
INLINE Bytes with_signs(const Bytes& b, const uint8_t* bits) {
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
