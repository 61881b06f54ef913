// The best scale, or scale and offset, of each sub-block by itself: some scales are tried, each with the levels nearest
// to it and then the scale that is best for those levels.
#pragma once

#include "level/quantize/batch.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Sums over the elements of each sub-block, of weights w, values x and levels l.
struct Sums {
  F32x16 wl = zero(), wll = zero(), wxl = zero();
};

// The element of each sub-block that is furthest from zero.
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

// The best of the scales that were considered, each by its inverse; `fit` has the sums with the levels nearest to it.
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

  // With the levels nearest to itself once more.
  F32x16 best(F32x16* curvature) {
    consider(inverse(scale));
    *curvature = bend;
    return scale;
  }
};

// x = scale * l, with l from -n to n - 1.
template <int size>
struct SymmetricFit {
  const Batch<size>& batch;
  const float n;

  SymmetricFit(const Batch<size>& of, int levels) : batch(of), n(static_cast<float>(levels)) {}

  F32x16 level(int i, F32x16 inv) const { return clamp(rounded(mul(batch.x[i], inv)), -n, n - 1); }

  Sums sums(F32x16 inv) const {
    Sums s;
    for (int i = 0; i < size; i++) {
      const F32x16 l = level(i, inv), wl = mul(batch.w[i], l);
      s.wll = add(s.wll, mul(wl, l));
      s.wxl = add(s.wxl, mul(wl, batch.x[i]));
    }
    return s;
  }

  // The scale, and in `curvature` what an error of it costs. Tried are scales that put the largest weight at -(n + k / 10)
  // for k from `first` on.
  F32x16 best(F32x16* curvature, int first = -9) const {
    ScaleSearch<SymmetricFit> search{*this};
    const F32x16 unit = inverse(largest(batch));
    for (int k = first; k <= 9; k++) search.consider(mul(unit, broadcast(-(n + 0.1f * static_cast<float>(k)))));
    return search.best(curvature);
  }
};

// x = scale * l + offset, with l from 0 to n; the offset is at most zero where `falls`.
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

  Sums sums(F32x16 inv, F32x16 offset) const {
    Sums s;
    for (int i = 0; i < size; i++) {
      const F32x16 l = level(i, inv, offset), wl = mul(batch.w[i], l);
      s.wl = add(s.wl, wl);
      s.wll = add(s.wll, mul(wl, l));
      s.wxl = add(s.wxl, mul(wl, batch.x[i]));
    }
    return s;
  }

  // The best line through the values over the levels that this one gives them.
  Line fitted(F32x16 inv, F32x16 offset) const {
    const Sums s = sums(inv, offset);
    const F32x16 d = sub(mul(w, s.wll), mul(s.wl, s.wl));
    Line line;
    line.scale = ratio(sub(mul(w, s.wxl), mul(wx, s.wl)), d);
    line.offset = ratio(sub(mul(s.wll, wx), mul(s.wl, s.wxl)), d);
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

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
