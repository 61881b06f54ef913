// A k-group in four NEON registers of four rows each, and integer dot products: with sdot, whose operands are both
// signed, or without it, on any ARMv8 processor, with one 16-bit sum per column.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Bytes {
  uint8x16_t v[4];
};

INLINE Bytes load_bytes(const uint8_t* p) { EACH_QUARTER(Bytes, vld1q_u8(p + 16 * i)); }
INLINE void store_bytes(uint8_t* p, Bytes b) {
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, b.v[i]);
}
template <int shift, int mask>
INLINE uint8x16_t field(uint8x16_t b) {
  if constexpr (shift > 0) b = vshrq_n_u8(b, shift);
  if constexpr (shift < 0) b = vshlq_n_u8(b, -shift);
  constexpr int left = shift >= 0 ? 255 >> shift : 255 << -shift & 255;
  return left == (mask & left) ? b : vandq_u8(b, vdupq_n_u8(mask));
}
template <int shift, int mask>
INLINE Bytes field(Bytes b) {
  EACH_QUARTER(Bytes, (field<shift, mask>(b.v[i])));
}
INLINE Bytes merge(Bytes a, Bytes b) { EACH_QUARTER(Bytes, vorrq_u8(a.v[i], b.v[i])); }
INLINE Bytes lookup(const uint8_t (&table)[16], Bytes b) {
  const uint8x16_t entries = vld1q_u8(table), low = vdupq_n_u8(15);
  EACH_QUARTER(Bytes, vqtbl1q_u8(entries, vandq_u8(b.v[i], low)));
}
template <int n>
INLINE I32x16 column(Bytes b) {
  EACH_QUARTER(I32x16, vreinterpretq_s32_u32(vreinterpretq_u32_u8(b.v[i]) >> (8 * n) & 255));
}
template <int n>
INLINE I32x16 signed_column(Bytes b) {
  EACH_QUARTER(I32x16, (vreinterpretq_s32_u8(b.v[i]) << (24 - 8 * n)) >> 24);
}

// The operand of `step`. Bytes of eight bits become signed by subtracting 128; smaller ones are signed as they are.
template <int kBits>
INLINE int8x16_t signed_bytes(uint8x16_t b) {
  return vreinterpretq_s8_u8(kBits < 8 ? b : veorq_u8(b, vdupq_n_u8(0x80)));
}
template <int kBits>
constexpr bool kCentred = kBits == 8;

INLINE I32x16 as_lanes(Bytes b) { EACH_QUARTER(I32x16, vreinterpretq_s32_u8(b.v[i])); }
INLINE Bytes as_bytes(I32x16 a) { EACH_QUARTER(Bytes, vreinterpretq_u8_s32(a.v[i])); }
INLINE Bytes both(Bytes a, Bytes b) { EACH_QUARTER(Bytes, vandq_u8(a.v[i], b.v[i])); }
INLINE Bytes add_bytes(Bytes a, Bytes b) { EACH_QUARTER(Bytes, vaddq_u8(a.v[i], b.v[i])); }

template <int offset>
INLINE Bytes with_signs(Bytes b, const uint8_t* bits) {
  const uint8x16_t one_bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)),
                   twice = vdupq_n_u8(2 * offset & 255);
  EACH_QUARTER(Bytes, vbslq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(bits[2 * i]), vdup_n_u8(bits[2 * i + 1])), one_bit),
                               vsubq_u8(twice, b.v[i]), b.v[i]));
}

constexpr bool kSumsFrom = false;
constexpr int kFloatRows = 1, kFloatTokens = 6;
constexpr int kDirectWidth = 4;
template <int kBits>
constexpr int kDirectTokens = 16;

#if defined(__ARM_FEATURE_DOTPROD)

constexpr int kPanelRows = 1, kPanelTokens = 4;
template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
  EACH_QUARTER(Sums, vdotq_s32(sums.v[i], signed_bytes<kBits>(w.v[i]), a));
}

#else

struct Sums {
  int16x8_t v[8];  // [two rows][4 columns]
};
using Scale = I32x16;

// 127 * the maximum byte (128 for eight bits, see signed_bytes) * groups stays below 32768.
template <int kBits>
constexpr int kGroupsPerSum = kBits <= 4 ? 16 : kBits == 5 ? 8 : kBits == 6 ? 4 : 2;

constexpr int kPanelRows = 1, kPanelTokens = 2;
INLINE Sums no_sums() {
  const int16x8_t none = vdupq_n_s16(0);
  return {{none, none, none, none, none, none, none, none}};
}
template <int kBits>
INLINE Sums step(Sums sums, Bytes w, int32_t activations) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(activations));
  const auto low = [&](int i) __attribute__((always_inline)) {
    return vmlal_s8(sums.v[2 * i], vget_low_s8(signed_bytes<kBits>(w.v[i])), vget_low_s8(a));
  };
  const auto high = [&](int i) __attribute__((always_inline)) {
    return vmlal_high_s8(sums.v[2 * i + 1], signed_bytes<kBits>(w.v[i]), a);
  };
  return {{low(0), high(0), low(1), high(1), low(2), high(2), low(3), high(3)}};
}
INLINE I32x16 in_lanes(Sums sums) {
  EACH_QUARTER(I32x16, vpaddq_s32(vpaddlq_s16(sums.v[2 * i]), vpaddlq_s16(sums.v[2 * i + 1])));
}
INLINE I32x16 add_sums(I32x16 total, Sums sums) { return add(total, in_lanes(sums)); }
INLINE Scale make_scale(I32x16 scale) { return scale; }
INLINE I32x16 scale_lanes(Scale scale) { return scale; }
INLINE I32x16 add_scaled(I32x16 total, I32x16 sums, Scale scale) {
  EACH_QUARTER(I32x16, vmlaq_s32(total.v[i], sums.v[i], scale.v[i]));
}
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) { return add_scaled(total, in_lanes(sums), scale); }
// Returns total + scale * (sums - offset). `offset` is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add_scaled(total, sub(in_lanes(sums), broadcast(offset)), scale);
}

#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
