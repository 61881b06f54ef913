// The activation functions of simd/math.h, as X(function). Kernels, row operations and their names are generated from
// this list.
#pragma once

#define LLAMACLUST_ACTIVATIONS(X) X(silu) X(gelu_erf) X(gelu_tanh) X(gelu_quick) X(sigmoid) X(relu_squared)
