// Rotation of a pair of channels by its angle.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

// Angles of a row as rope.rotation writes them: cosines, then sines. Null for no rotation.
struct Rotation {
  const float* angles;
  int pairs, neox;

  // Rotates pair i of the head at x: channels (2i, 2i + 1), or (i, i + pairs) if `neox`.
  DEVICE void turn(float* x, int i) const {
    const float c = angles[i], s = angles[pairs + i];
    float& first = x[neox ? i : 2 * i];
    float& second = x[neox ? i + pairs : 2 * i + 1];
    const float a = first, b = second;
    first = fma(-b, s, mul(a, c));
    second = fma(b, c, mul(a, s));
  }
};

}  // namespace llamaclust::cuda
