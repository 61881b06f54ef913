// Loops over n floats, sixteen at a time.
#pragma once

#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Calls f(i, load, store) for i = 0, 16, ... below n. The last piece may be partial; its missing lanes are read as 0.
template <typename F>
INLINE void each_lanes(int n, F f) {
  int i = 0;
  for (; i + 16 <= n; i += 16) f(i, [](const float* p) { return load(p); }, [](float* p, F32x16 x) { store(p, x); });
  const int rest = n - i;
  if (rest > 0)
    f(
        i, [rest](const float* p) { return load_first(rest, p); },
        [rest](float* p, F32x16 x) { store_first(rest, p, x); });
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
