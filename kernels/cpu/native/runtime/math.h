// Elementary functions for one value, compiled once without instruction-set flags: a fixed list of IEEE operations, so
// that no machine's libm decides a bit.
#pragma once

namespace llamaclust {

// Natural logarithm, error below 1e-15 relative or absolute; -infinity of 0, NaN of negative numbers.
double log_double(double x);

// e^x, error below 1e-15 relative; 0 below -746, infinity above 710, NaN of NaN.
double exp_double(double x);

// Error below 1e-15 for |angle| <= 4e6 radians, NaN beyond (and for NaN).
void sincos_double(double angle, double* sine, double* cosine);

}  // namespace llamaclust
