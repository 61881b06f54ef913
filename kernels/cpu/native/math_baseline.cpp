#include "math_baseline.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace llamaclust {
namespace {

// Coefficients of z^0 first.
template <int n>
double polynomial(const double (&coefficients)[n], double z) {
  double r = coefficients[n - 1];
  for (int i = n - 2; i >= 0; i--) r = std::fma(r, z, coefficients[i]);
  return r;
}

// Minimax on |t| <= pi/4: sin t = t + t^3 S(t^2), cos t = 1 - t^2/2 + t^4 C(t^2).
constexpr double kSine[] = {-0x1.555555555553dp-3,  0x1.111111110ea98p-7,   -0x1.a01a019aa6c46p-13,
                            0x1.71de346ae5b0ap-19, -0x1.ae5dad1465d6cp-26, 0x1.5d62d067a859ap-33};
constexpr double kCosine[] = {0x1.555555555554bp-5,   -0x1.6c16c16c1500ap-10, 0x1.a01a019c8ca0bp-16,
                              -0x1.27e4f7eea2c35p-22, 0x1.1ee9d912724afp-29,  -0x1.8fa4bc3b018c2p-37};
// atanh(s) = s + s^3 A(s^2), Taylor; |s| <= 0.1716 leaves 1e-19.
constexpr double kArtanh[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                              1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};

// e^r, Taylor; |r| <= 0.3466 leaves 1e-17.
constexpr double kExponential[] = {1.0,          1.0,           1.0 / 2,        1.0 / 6,         1.0 / 24,
                                   1.0 / 120,    1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                   1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

}  // namespace

double exp_double(double x) {
  if (x != x) return x;
  if (x > 710) return std::numeric_limits<double>::infinity();
  if (x < -746) return 0;
  const double shift = 0x1.8p52;
  const double n = (x * 0x1.71547652b82fep+0 + shift) - shift;  // x / ln 2, to nearest
  const double r = std::fma(-n, 0x1.ef35793c7673p-45, std::fma(-n, 0x1.62e42fefa38p-1, x));
  return std::ldexp(polynomial(kExponential, r), static_cast<int>(n));
}

double log_double(double x) {
  if (x == 0) return -std::numeric_limits<double>::infinity();
  if (!(x > 0) || x > std::numeric_limits<double>::max()) return x > 0 ? x : std::numeric_limits<double>::quiet_NaN();
  const bool subnormal = x < std::numeric_limits<double>::min();
  const uint64_t bits = std::bit_cast<uint64_t>(subnormal ? x * 0x1p54 : x);
  // x = m 2^e, m in [sqrt(1/2), sqrt(2)): the exponent counts from sqrt(1/2)'s bits.
  const uint64_t root_half = 0x3FE6A09E667F3BCD;
  const int64_t e = static_cast<int64_t>(bits - root_half) >> 52;
  const double m = std::bit_cast<double>(bits - (static_cast<uint64_t>(e) << 52));
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  const double exponent = static_cast<double>(subnormal ? e - 54 : e);
  const double tail = std::fma(s * z, 2 * polynomial(kArtanh, z), exponent * 0x1.ef35793c7673p-45);
  return std::fma(exponent, 0x1.62e42fefa38p-1, 2 * s + tail);  // ln 2 in two parts, the first product exact
}

void sincos_double(double angle, double* sine, double* cosine) {
  if (!(angle >= -4e6 && angle <= 4e6)) {
    *sine = *cosine = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const double shift = 0x1.8p52;
  const double n = (angle * 0x1.45f306dc9c883p-1 + shift) - shift;  // angle / (pi/2), to nearest
  const double t = std::fma(-n, 0x1.1a62633145c07p-54, std::fma(-n, 0x1.921fb54442d18p+0, angle));
  const double z = t * t;
  const double s = std::fma(t * z, polynomial(kSine, z), t);
  const double c = std::fma(z * z, polynomial(kCosine, z), std::fma(-0.5, z, 1.0));
  const int quadrant = static_cast<int>(n) & 3;
  const double sine_part = quadrant & 1 ? c : s, cosine_part = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -sine_part : sine_part;
  *cosine = (quadrant == 1 || quadrant == 2) ? -cosine_part : cosine_part;
}

}  // namespace llamaclust
