// The activation functions of simd/math.h: X(function). Kernels, operations of row steps and their names follow from it.
#pragma once

#define LLAMACLUST_ACTIVATIONS(X) X(silu) X(gelu_erf) X(gelu_tanh) X(gelu_quick) X(sigmoid) X(relu_squared)
