// exp, silu, tanh, erf and gelu of a float, and sine and cosine of a double: the CPU levels' source, compiled for a
// GPU.
#pragma once

#include "base.cuh"

#define LLAMACLUST_LEVEL cuda
#define ELEMENTARY [[maybe_unused]] __device__ __forceinline__
#define COEFFICIENTS [[maybe_unused]] static __device__ constexpr

#include "simd/sincos.h"
#include "simd/math.h"
