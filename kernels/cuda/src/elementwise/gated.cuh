// What feed-forward networks and experts make of gate and up.
#pragma once

#include "math.cuh"

namespace llamaclust::cuda {

inline constexpr float kSwigluLimit = 7.0f;

// Each as GATED(name, value), which those who use it define: the value of a, an element of the gate, and b, one of up.
#define LLAMACLUST_GATED LLAMACLUST_ACTIVATIONS(GATED_BY) GATED(clamped_swiglu, clamped_swiglu(a, b, kSwigluLimit))
#define GATED_BY(function) GATED(function##_mul, mul(function(a), b))

}  // namespace llamaclust::cuda
