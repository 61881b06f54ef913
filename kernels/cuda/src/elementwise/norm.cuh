// Root mean square norms.
#pragma once

#include "lines.cuh"
#include "math.cuh"

namespace llamaclust::cuda {

DEVICE float norm_scale(float squares, int n, float epsilon) {
  return div(1.0f, sqrt(add(div(squares, static_cast<float>(n)), epsilon)));
}

// out = x * scale * weight, by a warp. out may be x, because a lane writes only elements that it alone reads.
DEVICE void norm_by_warp(const float* x, const float* weight, float epsilon, int width, float* out) {
  Lanes lanes;
  lanes.add_elements(width, [x](float sum, int i) { return fma(x[i], x[i], sum); });
  const float scale = norm_scale(lanes.total(), width, epsilon);
  for (int i = threadIdx.x % kWarp; i < width; i += kWarp) out[i] = mul(mul(x[i], scale), weight[i]);
}

}  // namespace llamaclust::cuda
