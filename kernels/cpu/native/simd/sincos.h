// Sine and cosine of a float64 in single IEEE operations. It must be compiled without contraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd/elementary.h"

namespace llamaclust {
namespace {

// Evaluates a polynomial; coefficients[i] is that of z^i.
template <int n>
ELEMENTARY double polynomial(const double (&coefficients)[n], double z) {
  double r = coefficients[n - 1];
  for (int i = n - 2; i >= 0; i--) r = fma(r, z, coefficients[i]);
  return r;
}

// Minimax coefficients on |t| <= pi/4: sin t = t + t^3 S(t^2), cos t = 1 - t^2/2 + t^4 C(t^2).
COEFFICIENTS double kSine[] = {-0x1.555555555553dp-3,  0x1.111111110ea98p-7,   -0x1.a01a019aa6c46p-13,
                               0x1.71de346ae5b0ap-19, -0x1.ae5dad1465d6cp-26, 0x1.5d62d067a859ap-33};
COEFFICIENTS double kCosine[] = {0x1.555555555554bp-5,   -0x1.6c16c16c1500ap-10, 0x1.a01a019c8ca0bp-16,
                                 -0x1.27e4f7eea2c35p-22, 0x1.1ee9d912724afp-29,  -0x1.8fa4bc3b018c2p-37};

// The error is below 1e-15 for |angle| <= 4e6 radians. Larger angles and NaN give NaN.
ELEMENTARY void sine_and_cosine(double angle, double& sine, double& cosine) {
  if (!(angle >= -4e6 && angle <= 4e6)) {
    const uint64_t nan = 0x7ff8000000000000;
    memcpy(&sine, &nan, sizeof sine);
    cosine = sine;
    return;
  }
  const double shift = 0x1.8p52;
  const double n = (angle * 0x1.45f306dc9c883p-1 + shift) - shift;  // angle / (pi/2), rounded to nearest
  const double t = fma(-n, 0x1.1a62633145c07p-54, fma(-n, 0x1.921fb54442d18p+0, angle));
  const double z = t * t;
  const double s = fma(t * z, polynomial(kSine, z), t);
  const double c = fma(z * z, polynomial(kCosine, z), fma(-0.5, z, 1.0));
  const int quadrant = static_cast<int>(n) & 3;
  const double sine_part = quadrant & 1 ? c : s, cosine_part = quadrant & 1 ? s : c;
  sine = quadrant & 2 ? -sine_part : sine_part;
  cosine = (quadrant == 1 || quadrant == 2) ? -cosine_part : cosine_part;
}

}  // namespace
}  // namespace llamaclust
