// Scales of sub-blocks as multiples of one scale of their block.
#pragma once

#include "level/quantize/batch.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// The multiples of d that a type can say.
struct SignedMultiples {  // -n to n - 1
  int n;
  float top() const { return static_cast<float>(-n); }
  float nearest(float x) const {
    return __builtin_rintf(std::clamp(x, static_cast<float>(-n), static_cast<float>(n - 1)));
  }
};
struct Multiples {  // 0 to n
  int n;
  float top() const { return static_cast<float>(n); }
  float nearest(float x) const { return __builtin_rintf(std::clamp(x, 0.0f, static_cast<float>(n))); }
};
struct OddMultiples {  // 1, 3, ... 2 n + 1
  int n;
  float top() const { return static_cast<float>(2 * n + 1); }
  float nearest(float x) const {
    return 2.0f * __builtin_rintf(std::clamp((x - 1.0f) * 0.5f, 0.0f, static_cast<float>(n))) + 1.0f;
  }
};

// d and multiples q [n] with the least sum of a (s - d q)^2 among seventeen tries: the largest scale is the largest
// multiple, or up to eight steps from it.
template <typename Grid>
float fit_scales(const float* s, const float* a, int n, Grid grid, float* q, float step = 0.1f) {
  float largest = 0;
  for (int j = 0; j < n; j++)
    if (__builtin_fabsf(s[j]) > __builtin_fabsf(largest)) largest = s[j];
  for (int j = 0; j < n; j++) q[j] = grid.nearest(0);
  if (largest == 0) return 0;
  float best_gain = -1, best = 0;
  for (int k = -8; k <= 8; k++) {
    const float inv = (grid.top() + step * static_cast<float>(k)) / largest;
    float sq = 0, qq = 0;
    for (int j = 0; j < n; j++) {
      const float multiple = grid.nearest(inv * s[j]);
      sq += a[j] * s[j] * multiple;
      qq += a[j] * multiple * multiple;
    }
    if (qq > 0 && sq * sq > best_gain * qq) {
      best_gain = sq * sq / qq;
      best = inv;
    }
  }
  if (best == 0) best = grid.top() / largest;
  float sq = 0, qq = 0;
  for (int j = 0; j < n; j++) {
    q[j] = grid.nearest(best * s[j]);
    sq += a[j] * s[j] * q[j];
    qq += a[j] * q[j] * q[j];
  }
  return qq > 0 ? sq / qq : 1 / best;
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
