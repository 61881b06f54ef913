// Elementary functions of single values. They are a fixed sequence of IEEE operations, compiled once without
// instruction-set flags, so that results do not depend on a machine's libm.
#pragma once

namespace llamaclust {

// Natural logarithm with an error below 1e-15, relative or absolute; -infinity for 0, NaN for negative numbers.
double log_double(double x);

// e^x with a relative error below 1e-15; 0 below -746, infinity above 710, NaN for NaN.
double exp_double(double x);

// Sine and cosine with an error below 1e-15 for |angle| <= 4e6 radians; NaN for larger angles and for NaN.
void sincos_double(double angle, double* sine, double* cosine);

}  // namespace llamaclust
