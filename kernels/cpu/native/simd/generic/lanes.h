// Lanes in plain C++ without any instruction set. The compiler may vectorize the loops, which keeps their IEEE results.
#pragma once

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};

// Returns a vector whose lane or byte i is the expression.
#define EACH(T, expression)                                                                      \
  T r;                                                                                           \
  for (int i = 0; i < static_cast<int>(sizeof r.v / sizeof *r.v); i++) r.v[i] = (expression); \
  return r

INLINE F32x16 load(const float* p) { EACH(F32x16, p[i]); }
INLINE void store(float* p, F32x16 x) { memcpy(p, x.v, sizeof x.v); }
INLINE F32x16 broadcast(float x) { EACH(F32x16, x); }
INLINE F32x16 zero() { EACH(F32x16, 0.0f); }
INLINE F32x16 add(F32x16 a, F32x16 b) { EACH(F32x16, a.v[i] + b.v[i]); }
INLINE F32x16 sub(F32x16 a, F32x16 b) { EACH(F32x16, a.v[i] - b.v[i]); }
INLINE F32x16 mul(F32x16 a, F32x16 b) { EACH(F32x16, a.v[i] * b.v[i]); }
INLINE F32x16 div(F32x16 a, F32x16 b) { EACH(F32x16, a.v[i] / b.v[i]); }
INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { EACH(F32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }    // a * b + c
INLINE F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) { EACH(F32x16, __builtin_fmaf(-a.v[i], b.v[i], c.v[i])); }  // c - a * b
INLINE F32x16 max(F32x16 a, F32x16 b) { EACH(F32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE F32x16 min(F32x16 a, F32x16 b) { EACH(F32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
// Returns lanes [0, n) of a and the other lanes of b.
INLINE F32x16 first(int n, F32x16 a, F32x16 b) { EACH(F32x16, i < n ? a.v[i] : b.v[i]); }
// a < b ? x : y
INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) { EACH(F32x16, a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
// Exact, also for subnormal halves: multiplying by 2^112 moves the exponent of a half to the bias of a float. (On a CPU
// without the conversion instruction, the compiler's own conversion is a function call per value.)
INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13, special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | special | (h & 0x8000u) << 16);
}
INLINE uint16_t float_to_half(float x) {
#if defined(__aarch64__)
  return __builtin_bit_cast(uint16_t, static_cast<__fp16>(x));  // g++ 12 has _Float16 on x86 only.
#else
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
#endif
}
INLINE float bfloat_to_float(uint16_t h) { return __builtin_bit_cast(float, static_cast<uint32_t>(h) << 16); }
INLINE F32x16 from_f16(const uint16_t* p) { EACH(F32x16, half_to_float(p[i])); }
INLINE void to_f16(uint16_t* p, F32x16 x) {
  for (int i = 0; i < 16; i++) p[i] = float_to_half(x.v[i]);
}
INLINE F32x16 from_bf16(const uint16_t* p) { EACH(F32x16, bfloat_to_float(p[i])); }
// Returns 2^(e - 128) for an exponent byte e. It is exact; the results for e = 0 and e = 1 are subnormal.
INLINE float halved_e8m0_to_float(uint8_t e) {
  return __builtin_bit_cast(float, e < 2 ? 0x200000u << e : (e - 1u) << 23);
}
INLINE F32x16 from_halved_e8m0(const uint8_t* p) { EACH(F32x16, halved_e8m0_to_float(p[i])); }
INLINE I32x16 broadcast(int32_t x) { EACH(I32x16, x); }
INLINE void store(int32_t* p, I32x16 x) { memcpy(p, x.v, sizeof x.v); }
INLINE I32x16 add(I32x16 a, I32x16 b) { EACH(I32x16, a.v[i] + b.v[i]); }
INLINE I32x16 sub(I32x16 a, I32x16 b) { EACH(I32x16, a.v[i] - b.v[i]); }
INLINE I32x16 mul(I32x16 a, I32x16 b) { EACH(I32x16, a.v[i] * b.v[i]); }
INLINE I32x16 max(I32x16 a, I32x16 b) { EACH(I32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <int n>
INLINE I32x16 shift_left(I32x16 a) { EACH(I32x16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n)); }
INLINE I32x16 shift_right(I32x16 a, int n) { EACH(I32x16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n)); }
// Divides by 2^n and rounds down.
template <int n>
INLINE I32x16 divide_by_power(I32x16 a) { EACH(I32x16, a.v[i] >> n); }
INLINE I32x16 keep(I32x16 a, int32_t mask) { EACH(I32x16, a.v[i] & mask); }
INLINE I32x16 either(I32x16 a, I32x16 b) { EACH(I32x16, a.v[i] | b.v[i]); }
INLINE F32x16 to_float(I32x16 a) { EACH(F32x16, static_cast<float>(a.v[i])); }
// Rounds to nearest, ties to even. The caller ensures |x| < 2^31, because results outside that range differ between
// machines.
INLINE I32x16 to_int(F32x16 a) { EACH(I32x16, static_cast<int32_t>(__builtin_lrintf(a.v[i]))); }
INLINE F32x16 bits_to_float(I32x16 a) { return __builtin_bit_cast(F32x16, a); }
INLINE I32x16 float_to_bits(F32x16 a) { return __builtin_bit_cast(I32x16, a); }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
