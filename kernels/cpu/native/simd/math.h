// exp and silu on sixteen lanes: a fixed list of IEEE operations, so every feature level gives the same bits.
#pragma once

#include "lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// 2^n for the n that sits in the low bits of `shifted` = n + 1.5 * 2^23, n in [-126, 127].
[[maybe_unused]] inline __attribute__((always_inline)) F32x16 power_of_two(F32x16 shifted) {
  return bits_to_float(shift_left<23>(sub(float_to_bits(shifted), broadcast(0x4B400000 - 127))));
}

// e^x within 1 ulp; 0 below -104, infinity above 88.73, NaN of NaN.
[[maybe_unused]] inline __attribute__((always_inline)) F32x16 exp(F32x16 x) {
  const F32x16 shift = broadcast(0x1.8p23f);  // adding it rounds to an integer, to nearest even
  x = max(broadcast(-104.0f), min(broadcast(89.0f), x));  // the second operand wins where one is NaN
  const F32x16 n = sub(fma(x, broadcast(0x1.715476p+0f), shift), shift);  // x / ln 2
  // r = x - n ln 2 in two parts; the first subtraction is exact.
  const F32x16 r = fnma(n, broadcast(-0x1.05c61p-29f), fnma(n, broadcast(0x1.62e43p-1f), x));
  F32x16 p = fma(broadcast(0x1.6a4d5ap-10f), r, broadcast(0x1.12398ep-7f));
  p = fma(p, r, broadcast(0x1.5558bp-5f));
  p = fma(p, r, broadcast(0x1.555492p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);  // p * 2^n, rounded once: what the two factors below give
#else
  // 2^n in two factors, so that n down to -150 rounds once into the subnormals and n = 128 overflows.
  const F32x16 half = fma(n, broadcast(0.5f), shift);
  const F32x16 rest = add(sub(n, sub(half, shift)), shift);
  return mul(mul(p, power_of_two(half)), power_of_two(rest));
#endif
}

// x / (1 + e^-x)
[[maybe_unused]] inline __attribute__((always_inline)) F32x16 silu(F32x16 x) {
  return div(x, add(broadcast(1.0f), exp(sub(zero(), x))));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
