// Sixteen lanes in four NEON registers.
#pragma once

#include <arm_neon.h>

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct F32x16 {
  float32x4_t v[4];
};
struct I32x16 {
  int32x4_t v[4];
};

// Returns a vector whose quarter i is the expression.
#define EACH_QUARTER(T, expression)                                                              \
  const auto quarter = [&](int i) __attribute__((always_inline)) { return expression; }; \
  return T{{quarter(0), quarter(1), quarter(2), quarter(3)}}

INLINE F32x16 load(const float* p) { EACH_QUARTER(F32x16, vld1q_f32(p + 4 * i)); }
INLINE void store(float* p, F32x16 x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
INLINE F32x16 broadcast(float x) {
  const float32x4_t r = vdupq_n_f32(x);
  return {{r, r, r, r}};
}
INLINE F32x16 zero() { return broadcast(0.0f); }
INLINE F32x16 add(F32x16 a, F32x16 b) { EACH_QUARTER(F32x16, vaddq_f32(a.v[i], b.v[i])); }
INLINE F32x16 sub(F32x16 a, F32x16 b) { EACH_QUARTER(F32x16, vsubq_f32(a.v[i], b.v[i])); }
INLINE F32x16 mul(F32x16 a, F32x16 b) { EACH_QUARTER(F32x16, vmulq_f32(a.v[i], b.v[i])); }
INLINE F32x16 div(F32x16 a, F32x16 b) { EACH_QUARTER(F32x16, vdivq_f32(a.v[i], b.v[i])); }
INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { EACH_QUARTER(F32x16, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }   // a * b + c
INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) { EACH_QUARTER(F32x16, vfmsq_f32(c.v[i], a.v[i], b.v[i])); }  // c - a * b
// a > b ? a : b and a < b ? a : b. They compare, because NEON's fmax and fmin return NaN if either operand is NaN.
INLINE F32x16 max(F32x16 a, F32x16 b) { EACH_QUARTER(F32x16, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
INLINE F32x16 min(F32x16 a, F32x16 b) { EACH_QUARTER(F32x16, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
// Returns lanes [0, n) of a and the other lanes of b.
INLINE F32x16 first(int n, F32x16 a, F32x16 b) {
  const int32x4_t lanes = {0, 1, 2, 3};
  EACH_QUARTER(F32x16, vbslq_f32(vcgtq_s32(vdupq_n_s32(n - 4 * i), lanes), a.v[i], b.v[i]));
}
// a < b ? x : y
INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  EACH_QUARTER(F32x16, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]));
}
INLINE F32x16 from_f16(const uint16_t* p) { EACH_QUARTER(F32x16, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))); }
INLINE void to_f16(uint16_t* p, F32x16 x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.v[0]), x.v[1])));
  vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.v[2]), x.v[3])));
}
INLINE F32x16 from_bf16(const uint16_t* p) { EACH_QUARTER(F32x16, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))); }
// Returns 2^(e - 128) for exponent bytes e. It is exact; the results for e = 0 and e = 1 are subnormal.
INLINE F32x16 from_halved_e8m0(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  const uint32x4_t e[4] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
                           vmovl_high_u16(high)};
  const uint32x4_t one = vdupq_n_u32(1), subnormal = vdupq_n_u32(0x200000);
  EACH_QUARTER(F32x16, vreinterpretq_f32_u32(vbslq_u32(vcleq_u32(e[i], one),
                                               vshlq_u32(subnormal, vreinterpretq_s32_u32(e[i])),
                                               vshlq_n_u32(vsubq_u32(e[i], one), 23))));
}
INLINE I32x16 broadcast(int32_t x) {
  const int32x4_t r = vdupq_n_s32(x);
  return {{r, r, r, r}};
}
INLINE void store(int32_t* p, I32x16 x) {
  for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, x.v[i]);
}
INLINE I32x16 add(I32x16 a, I32x16 b) { EACH_QUARTER(I32x16, vaddq_s32(a.v[i], b.v[i])); }
INLINE I32x16 sub(I32x16 a, I32x16 b) { EACH_QUARTER(I32x16, vsubq_s32(a.v[i], b.v[i])); }
INLINE I32x16 mul(I32x16 a, I32x16 b) { EACH_QUARTER(I32x16, vmulq_s32(a.v[i], b.v[i])); }
INLINE I32x16 max(I32x16 a, I32x16 b) { EACH_QUARTER(I32x16, vmaxq_s32(a.v[i], b.v[i])); }
template <int n>
INLINE I32x16 shift_left(I32x16 a) { EACH_QUARTER(I32x16, vshlq_n_s32(a.v[i], n)); }
// Shifts in zeros. (With the operator, a constant n becomes an immediate; the intrinsic for variable shifts prevents
// that.)
INLINE I32x16 shift_right(I32x16 a, int n) {
  EACH_QUARTER(I32x16, vreinterpretq_s32_u32(vreinterpretq_u32_s32(a.v[i]) >> static_cast<uint32_t>(n)));
}
// Divides by 2^n and rounds down.
template <int n>
INLINE I32x16 divide_by_power(I32x16 a) { EACH_QUARTER(I32x16, vshrq_n_s32(a.v[i], n)); }
INLINE I32x16 keep(I32x16 a, int32_t mask) { EACH_QUARTER(I32x16, vandq_s32(a.v[i], vdupq_n_s32(mask))); }
INLINE I32x16 either(I32x16 a, I32x16 b) { EACH_QUARTER(I32x16, vorrq_s32(a.v[i], b.v[i])); }
INLINE F32x16 to_float(I32x16 a) { EACH_QUARTER(F32x16, vcvtq_f32_s32(a.v[i])); }
// Rounds to nearest, ties to even. The caller ensures |x| < 2^31, because results outside that range differ between
// machines.
INLINE I32x16 to_int(F32x16 a) { EACH_QUARTER(I32x16, vcvtnq_s32_f32(a.v[i])); }
INLINE F32x16 bits_to_float(I32x16 a) { EACH_QUARTER(F32x16, vreinterpretq_f32_s32(a.v[i])); }
INLINE I32x16 float_to_bits(F32x16 a) { EACH_QUARTER(I32x16, vreinterpretq_s32_f32(a.v[i])); }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
