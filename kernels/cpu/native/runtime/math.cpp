#include "runtime/math.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd/sincos.h"

namespace llamaclust {
namespace {

// Coefficients of atanh(s) = s + s^3 A(s^2), a Taylor series. For |s| <= 0.1716 the remainder is below 1e-19.
constexpr double kArtanh[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                              1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};

// Coefficients of e^r, a Taylor series. For |r| <= 0.3466 the remainder is below 1e-17.
constexpr double kExponential[] = {1.0,          1.0,           1.0 / 2,        1.0 / 6,         1.0 / 24,
                                   1.0 / 120,    1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                   1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

}  // namespace

double exp_double(double x) {
  if (x != x) return x;
  if (x > 710) return std::numeric_limits<double>::infinity();
  if (x < -746) return 0;
  const double shift = 0x1.8p52;
  const double n = (x * 0x1.71547652b82fep+0 + shift) - shift;  // x / ln 2, rounded to nearest.
  const double r = std::fma(-n, 0x1.ef35793c7673p-45, std::fma(-n, 0x1.62e42fefa38p-1, x));
  return std::ldexp(polynomial(kExponential, r), static_cast<int>(n));
}

double log_double(double x) {
  if (x == 0) return -std::numeric_limits<double>::infinity();
  if (!(x > 0) || x > std::numeric_limits<double>::max()) return x > 0 ? x : std::numeric_limits<double>::quiet_NaN();
  const bool subnormal = x < std::numeric_limits<double>::min();
  const uint64_t bits = std::bit_cast<uint64_t>(subnormal ? x * 0x1p54 : x);
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)). Subtracting the bits of sqrt(1/2) leaves e in the exponent field.
  const uint64_t root_half = 0x3FE6A09E667F3BCD;
  const int64_t e = static_cast<int64_t>(bits - root_half) >> 52;
  const double m = std::bit_cast<double>(bits - (static_cast<uint64_t>(e) << 52));
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  const double exponent = static_cast<double>(subnormal ? e - 54 : e);
  const double tail = std::fma(s * z, 2 * polynomial(kArtanh, z), exponent * 0x1.ef35793c7673p-45);
  // ln 2 is split into two parts, so that the product with the first part is exact.
  return std::fma(exponent, 0x1.62e42fefa38p-1, 2 * s + tail);
}

void sincos_double(double angle, double* sine, double* cosine) { sine_and_cosine(angle, *sine, *cosine); }

}  // namespace llamaclust
