// exp, silu, tanh and gelu of sixteen lanes. Each is a fixed sequence of IEEE operations, so every feature level gives
// the same bits.
#pragma once

#include "simd/activations.h"
#include "simd/elementary.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Returns 2^n for n in [-126, 127], which is in the low bits of `shifted` = n + 1.5 * 2^23.
ELEMENTARY F32x16 power_of_two(F32x16 shifted) {
  return bits_to_float(shift_left<23>(sub(float_to_bits(shifted), broadcast(0x4B400000 - 127))));
}

// e^x with an error below 1 ulp; 0 below -104, infinity above 88.73, NaN for NaN.
ELEMENTARY F32x16 exp(F32x16 x) {
  const F32x16 shift = broadcast(0x1.8p23f);  // Adding it rounds to the nearest integer, ties to even.
  x = max(broadcast(-104.0f), min(broadcast(89.0f), x));  // If an operand is NaN, the second one is returned.
  const F32x16 n = sub(fma(x, broadcast(0x1.715476p+0f), shift), shift);  // x / ln 2
  // r = x - n * ln 2, with ln 2 in two parts. The first subtraction is exact.
  const F32x16 r = fnma(n, broadcast(-0x1.05c61p-29f), fnma(n, broadcast(0x1.62e43p-1f), x));
  F32x16 p = fma(broadcast(0x1.6a4d5ap-10f), r, broadcast(0x1.12398ep-7f));
  p = fma(p, r, broadcast(0x1.5558bp-5f));
  p = fma(p, r, broadcast(0x1.555492p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  // p * 2^n, rounded once. The two factors below give the same bits.
  return _mm512_scalef_ps(p, n);
#else
  // 2^n is applied as two factors, so that n down to -150 rounds once to a subnormal, and n = 128 overflows.
  const F32x16 half = fma(n, broadcast(0.5f), shift);
  const F32x16 rest = add(sub(n, sub(half, shift)), shift);
  return mul(mul(p, power_of_two(half)), power_of_two(rest));
#endif
}

// c0 + c1 z + c2 z^2 ...
template <int n>
ELEMENTARY F32x16 polynomial(const float (&coefficients)[n], F32x16 z) {
  F32x16 r = broadcast(coefficients[n - 1]);
  for (int i = n - 2; i >= 0; i--) r = fma(r, z, broadcast(coefficients[i]));
  return r;
}

// x P(x^2) / Q(x^2) with x limited to [-limit, limit]; NaN for NaN.
template <int n, int m>
ELEMENTARY F32x16 odd_quotient(F32x16 x, float limit, const float (&p)[n], const float (&q)[m]) {
  x = max(broadcast(-limit), min(broadcast(limit), x));
  const F32x16 z = mul(x, x);
  return div(mul(x, polynomial(p, z)), polynomial(q, z));
}

// Minimax approximations with a relative error of 2e-9 for tanh and 2e-8 for erf. Beyond the limits, both functions are
// 1 to half an ulp.
COEFFICIENTS float kTanhLimit = 0x1.2058p+3f, kErfLimit = 0x1.f5ap+1f;
COEFFICIENTS float kTanhP[] = {0x1p+0f,          0x1.182c6p-3f,    0x1.fb1956p-9f,
                            0x1.d6112cp-16f, 0x1.06f208p-25f, -0x1.ae0c58p-37f};
COEFFICIENTS float kTanhQ[] = {0x1p+0f, 0x1.e16b84p-2f, 0x1.be6d78p-6f, 0x1.9d17f2p-12f, 0x1.59c6b4p-20f};
COEFFICIENTS float kErfP[] = {0x1.20dd74p+0f, 0x1.85e486p-3f,  0x1.b01762p-5f,
                           0x1.ed6cf4p-9f, 0x1.2aba68p-12f, 0x1.133e74p-19f};
COEFFICIENTS float kErfQ[] = {0x1p+0f,         0x1.010cbap-1f,  0x1.d3580ep-4f,
                           0x1.ea70a6p-7f, 0x1.30b2b4p-10f, 0x1.3f9842p-15f};

ELEMENTARY F32x16 tanh(F32x16 x) { return odd_quotient(x, kTanhLimit, kTanhP, kTanhQ); }
ELEMENTARY F32x16 erf(F32x16 x) { return odd_quotient(x, kErfLimit, kErfP, kErfQ); }

// tanh(x / cap) * cap
ELEMENTARY F32x16 soft_cap(F32x16 x, F32x16 cap) { return mul(tanh(div(x, cap)), cap); }

// x / 2 * (1 + erf(x / sqrt(2)))
ELEMENTARY F32x16 gelu_erf(F32x16 x) {
  const F32x16 half = mul(x, broadcast(0.5f));
  return fma(half, erf(mul(x, broadcast(0x1.6a09e6p-1f))), half);
}

// x / (1 + e^(-2 u)), which is x / 2 * (1 + tanh(u)), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
ELEMENTARY F32x16 gelu_tanh(F32x16 x) {
  const F32x16 slope = fma(mul(x, x), broadcast(-0x1.2444f2p-4f), broadcast(-0x1.988454p+0f));
  return div(x, add(broadcast(1.0f), exp(mul(x, slope))));
}

// x / (1 + e^-x)
ELEMENTARY F32x16 silu(F32x16 x) { return div(x, add(broadcast(1.0f), exp(sub(zero(), x)))); }

// x / (1 + e^(-1.702 x))
ELEMENTARY F32x16 gelu_quick(F32x16 x) { return div(x, add(broadcast(1.0f), exp(mul(x, broadcast(-1.702f))))); }

// max(x, 0)^2; NaN for NaN
ELEMENTARY F32x16 relu_squared(F32x16 x) {
  const F32x16 positive = max(zero(), x);  // If an operand is NaN, the second one is returned.
  return mul(positive, positive);
}

// 1 / (1 + e^-x)
ELEMENTARY F32x16 sigmoid(F32x16 x) { return div(broadcast(1.0f), add(broadcast(1.0f), exp(sub(zero(), x)))); }

// Coefficients of ln(1 + y) / (2 s) in powers of s^2, with s = y / (2 + y) <= 1/3. The next term is below 2e-9.
COEFFICIENTS float kLog1p[] = {1.0f, 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9, 1.0f / 11, 1.0f / 13, 1.0f / 15};

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|)
ELEMENTARY F32x16 softplus(F32x16 x) {
  const F32x16 y = exp(min(sub(zero(), x), x)), s = div(y, add(broadcast(2.0f), y));
  return fma(mul(s, broadcast(2.0f)), polynomial(kLog1p, mul(s, s)), max(zero(), x));
}

// g / (1 + e^(-1.702 g)) * (u + 1), with g = min(gate, limit), and u = up limited to [-limit, limit]
ELEMENTARY F32x16 clamped_swiglu(F32x16 gate, F32x16 up, F32x16 limit) {
  const F32x16 g = min(limit, gate), u = max(sub(zero(), limit), min(limit, up));
  const F32x16 divisor = add(broadcast(1.0f), exp(mul(g, broadcast(-1.702f))));
  return mul(div(g, divisor), add(u, broadcast(1.0f)));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
