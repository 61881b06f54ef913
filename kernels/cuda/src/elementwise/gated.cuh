// The combinations of gate and up in feed-forward networks and experts.
#pragma once

#include "math.cuh"

namespace llamaclust::cuda {

inline constexpr float kSwigluLimit = 7.0f;

// Lists them as GATED(name, value), a macro that the user defines. `value` is an expression of a, an element of the
// gate, and b, an element of up.
#define LLAMACLUST_GATED LLAMACLUST_ACTIVATIONS(GATED_BY) GATED(clamped_swiglu, clamped_swiglu(a, b, kSwigluLimit))
#define GATED_BY(function) GATED(function##_mul, mul(function(a), b))

}  // namespace llamaclust::cuda
