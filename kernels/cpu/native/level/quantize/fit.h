// Searches the best scale, or scale and offset, of each sub-block independently. Sixteen sub-blocks are computed in the
// lanes, so that searches need no sums across lanes. A search tries some scales. For each, it takes the nearest levels,
// and then the scale that is best for those levels. The file also fits scales of sub-blocks as multiples of their
// block's scale.
#pragma once

#include <algorithm>
#include <cstdint>

#include "level/level.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Element i of sub-block j is lane j of x[i]. Lanes beyond the end of the data are 0.
template <int size>
struct Batch {
  F32x16 x[size], w[size];

  static void turn(const float* from, int64_t subs, F32x16* to) {
    alignas(64) float turned[size][16] = {};
    for (int j = 0; j < subs; j++)
      for (int i = 0; i < size; i++) turned[i][j] = from[j * size + i];
    for (int i = 0; i < size; i++) to[i] = load(turned[i]);
  }
  Batch(const float* values, const float* weights, int64_t subs) {
    turn(values, subs, x);
    turn(weights, subs, w);
  }
};

// Calls f(batch, first, subs) for every sixteen sub-blocks; `subs` of them exist, starting with `first`.
template <int size, typename F>
void each_batch(const Source& from, F f) {
  for (int64_t first = 0; first < from.count / size; first += 16) {
    const int64_t subs = std::min<int64_t>(16, from.count / size - first);
    f(Batch<size>(from.x + first * size, from.w + first * size, subs), first, static_cast<int>(subs));
  }
}

// Stores the levels as bytes [16 * size] in the order of the data. level(i) returns those of elements i.
template <int size, typename F>
void store_levels(F level, uint8_t* out) {
  alignas(64) int32_t lanes[size][16];
  for (int i = 0; i < size; i++) store(lanes[i], to_int(level(i)));
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < size; i++) out[j * size + i] = static_cast<uint8_t>(lanes[i][j]);
}

[[maybe_unused]] F32x16 rounded(F32x16 x) { return to_float(to_int(x)); }
[[maybe_unused]] F32x16 clamp(F32x16 x, float low, float high) { return min(max(x, broadcast(low)), broadcast(high)); }
// x / y; 0 unless y > 0.
[[maybe_unused]] F32x16 ratio(F32x16 x, F32x16 y) {
  return select_less(zero(), y, div(x, select_less(zero(), y, y, broadcast(1.0f))), zero());
}
// 1 / x; 0 for 0.
[[maybe_unused]] F32x16 inverse(F32x16 x) {
  const F32x16 size = max(x, sub(zero(), x));
  return select_less(zero(), size, div(broadcast(1.0f), select_less(zero(), size, x, broadcast(1.0f))), zero());
}

// Rounds x to float16.
[[maybe_unused]] float as_half(float x) { return half_value(half_bits(x)); }
[[maybe_unused]] void put_half(float x, uint8_t* out) {
  const uint16_t bits = half_bits(x);
  memcpy(out, &bits, 2);
}

// Sums over the elements of each sub-block. The names have w for the weight (importance), x for the value and l for the
// level.
struct Sums {
  F32x16 wl = zero(), wll = zero(), wxl = zero();
};

template <int size, typename F>
INLINE Sums sums_of(const Batch<size>& batch, F level) {
  Sums s;
  for (int i = 0; i < size; i++) {
    const F32x16 l = level(i), wl = mul(batch.w[i], l);
    s.wl = add(s.wl, wl);
    s.wll = add(s.wll, mul(wl, l));
    s.wxl = add(s.wxl, mul(wl, batch.x[i]));
  }
  return s;
}

// A scale, and the curvature of the error around it.
struct Scaled {
  F32x16 scale, curvature;
};

// Returns the element of each sub-block with the greatest magnitude.
template <int size>
F32x16 largest(const Batch<size>& batch) {
  F32x16 largest = zero(), extent = zero();
  for (const F32x16 v : batch.x) {
    const F32x16 magnitude = max(v, sub(zero(), v));
    largest = select_less(extent, magnitude, v, largest);
    extent = max(extent, magnitude);
  }
  return largest;
}

// Keeps the best of the scales that were considered, each given by its inverse. fit.sums() uses the levels nearest to
// that scale.
template <typename Fit>
struct ScaleSearch {
  const Fit& fit;
  F32x16 gain = broadcast(-1.0f), scale = zero(), bend = zero();

  void consider(F32x16 inv) {
    const Sums s = fit.sums(inv);
    const F32x16 fitted = ratio(s.wxl, s.wll), explained = mul(fitted, s.wxl);
    scale = select_less(gain, explained, fitted, scale);
    bend = select_less(gain, explained, s.wll, bend);
    gain = max(explained, gain);
  }

  // Considers the best scale itself as well, with the levels nearest to it.
  Scaled best() {
    consider(inverse(scale));
    return {scale, bend};
  }
};

// x = scale * l, with l from -n to n - 1.
template <int size>
struct SymmetricFit {
  const Batch<size>& batch;
  const float n;

  SymmetricFit(const Batch<size>& of, int levels) : batch(of), n(static_cast<float>(levels)) {}

  F32x16 level(int i, F32x16 inv) const { return clamp(rounded(mul(batch.x[i], inv)), -n, n - 1); }

  INLINE Sums sums(F32x16 inv) const {
    return sums_of(batch, [&](int i) { return level(i, inv); });
  }

  // Tries scales that put the largest weight at -(n + k / 10), for k from `first` to 9.
  Scaled best(int first = -9) const {
    ScaleSearch<SymmetricFit> search{*this};
    const F32x16 unit = inverse(largest(batch));
    for (int k = first; k <= 9; k++) search.consider(mul(unit, broadcast(-(n + 0.1f * static_cast<float>(k)))));
    return search.best();
  }
};

// x = scale * l + offset, with l from 0 to n. If `falls`, the offset is at most 0.
template <int size>
struct AffineFit {
  const Batch<size>& batch;
  const float n;
  const bool falls;
  F32x16 w = zero(), wx = zero(), low, high;

  AffineFit(const Batch<size>& of, int levels, bool offset_falls)
      : batch(of), n(static_cast<float>(levels)), falls(offset_falls), low(of.x[0]), high(of.x[0]) {
    for (int i = 0; i < size; i++) {
      w = add(w, batch.w[i]);
      wx = add(wx, mul(batch.w[i], batch.x[i]));
      low = min(low, batch.x[i]);
      high = max(high, batch.x[i]);
    }
    if (falls) low = min(low, zero());
  }

  struct Line {
    F32x16 scale = zero(), offset = zero(), gain = broadcast(-1.0f), wll = zero();
  };

  F32x16 level(int i, F32x16 inv, F32x16 offset) const {
    return clamp(rounded(mul(sub(batch.x[i], offset), inv)), 0, n);
  }

  // Returns the best line through the values, for the levels that the given line assigns to them. Keeps its scale
  // if the levels are equal, or so nearly that d is mostly rounding error.
  Line fitted(F32x16 inv, F32x16 offset) const {
    const Sums s = sums_of(batch, [&](int i) { return level(i, inv, offset); });
    const F32x16 squares = mul(w, s.wll), d = sub(squares, mul(s.wl, s.wl)), least = mul(squares, broadcast(1e-5f));
    const F32x16 scale = ratio(sub(mul(w, s.wxl), mul(wx, s.wl)), d);
    const F32x16 shift = ratio(sub(mul(s.wll, wx), mul(s.wl, s.wxl)), d);
    Line line;
    line.scale = select_less(least, d, scale, inverse(inv));
    line.offset = select_less(least, d, shift, ratio(sub(wx, mul(line.scale, s.wl)), w));
    if (falls) {
      const F32x16 through_zero = ratio(s.wxl, s.wll);
      line.scale = select_less(zero(), line.offset, through_zero, line.scale);
      line.offset = min(line.offset, zero());
    }
    line.gain = add(mul(line.scale, s.wxl), mul(line.offset, wx));
    line.wll = s.wll;
    return line;
  }

  Line best(int tries, float first, float step) const {
    const F32x16 span = inverse(sub(high, low));
    Line best;
    best.offset = low;
    const auto consider = [&](F32x16 inv, F32x16 offset) {
      const Line line = fitted(inv, offset);
      best.scale = select_less(best.gain, line.gain, line.scale, best.scale);
      best.offset = select_less(best.gain, line.gain, line.offset, best.offset);
      best.wll = select_less(best.gain, line.gain, line.wll, best.wll);
      best.gain = max(line.gain, best.gain);
    };
    for (int k = 0; k < tries; k++) consider(mul(span, broadcast(n + first + step * static_cast<float>(k))), low);
    consider(inverse(best.scale), best.offset);
    return best;
  }
};

// The multiples of d that a type can represent.
struct Multiples {
  float low, high, top;  // The multiple of the largest scale.
  static Multiples up_to(float n) { return {0, n, n}; }
  static Multiples with_sign(float n) { return {-n, n - 1, -n}; }
  float nearest(float x) const { return __builtin_rintf(std::clamp(x, low, high)); }
};
struct OddMultiples {  // 1, 3, ... 2 n + 1
  float n, top = 2 * n + 1;
  float nearest(float x) const { return 2.0f * __builtin_rintf(std::clamp((x - 1.0f) * 0.5f, 0.0f, n)) + 1.0f; }
};

// Finds d and multiples q [n] with the smallest sum of a (s - d q)^2 among seventeen tries. A try gives the largest
// scale the multiple `top`, or one up to eight steps away.
template <typename Grid>
float fit_scales(const float* s, const float* a, int n, Grid grid, float* q, float step = 0.1f) {
  float largest = 0;
  for (int j = 0; j < n; j++)
    if (__builtin_fabsf(s[j]) > __builtin_fabsf(largest)) largest = s[j];
  for (int j = 0; j < n; j++) q[j] = grid.nearest(0);
  if (largest == 0) return 0;
  float best_gain = -1, best = 0;
  for (int k = -8; k <= 8; k++) {
    const float inv = (grid.top + step * static_cast<float>(k)) / largest;
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
  if (best == 0) best = grid.top / largest;
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
