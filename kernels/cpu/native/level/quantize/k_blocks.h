// Blocks of 256 weights whose sub-blocks have scales, and offsets in some types, that are multiples of the block's own.
#pragma once

#include "level/quantize/fit.h"
#include "level/quantize/scales.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// What a sub-block's line adds up to with fixed levels: for the block's scales, once more, with those levels.
struct alignas(64) BlockSums {
  float wl[16], wll[16], wxl[16];
};

// x = d * a * l - m * b in sixteen sub-blocks of `size`, of one block or two; a and b are small whole numbers.
template <int size>
struct AffineBlocks {
  static constexpr int kSubs = 256 / size, kBlocks = size / 16;
  alignas(64) float a[16] = {}, b[16] = {}, w[16], wx[16];
  uint16_t d[kBlocks], m[kBlocks];
  uint8_t levels[16 * size];

  AffineBlocks(const Batch<size>& batch, int top_level, int top_multiple, int tries, float first, float step) {
    const AffineFit<size> fit(batch, top_level, true);
    choose(fit.best(tries, first, step), top_multiple, fit);
    if (top_multiple < 16) settle(fit, static_cast<float>(top_multiple));
    F32x16 lanes[size];
    BlockSums sums;
    assign(fit, lanes, &sums);
    for (int k = 0; k < kBlocks; k++) refit(k, sums);
    assign(fit, lanes, &sums);
    store_levels<size>(lanes, levels);
  }

 private:
  void choose(const typename AffineFit<size>::Line& line, int top, const AffineFit<size>& fit) {
    alignas(64) float scale[16], offset[16], curvature[16];
    store(scale, line.scale);
    store(offset, sub(zero(), line.offset));
    store(curvature, line.wll);
    store(w, fit.w);
    store(wx, fit.wx);
    for (int k = 0; k < kBlocks; k++) {
      const int j = k * kSubs;
      d[k] = half_bits(fit_scales(scale + j, curvature + j, kSubs, Multiples{top}, a + j));
      m[k] = half_bits(fit_scales(offset + j, w + j, kSubs, Multiples{top}, b + j));
    }
  }

  // Other multiples next to those there are, where they are better together: with few of them, rounding each by itself
  // is far from the best.
  void settle(const AffineFit<size>& fit, float top) {
    alignas(64) float d_each[16], m_each[16];
    for (int j = 0; j < 16; j++) {
      d_each[j] = half_value(d[j / kSubs]);
      m_each[j] = half_value(m[j / kSubs]);
    }
    const F32x16 a_was = load(a), b_was = load(b);
    F32x16 best_loss = broadcast(3e38f), best_a = a_was, best_b = b_was;
    for (int k = 0; k < 9; k++) {
      const F32x16 a_now = clamp(add(a_was, broadcast(static_cast<float>(k % 3 - 1))), 0, top);
      const F32x16 b_now = clamp(add(b_was, broadcast(static_cast<float>(k / 3 - 1))), 0, top);
      const F32x16 scale = mul(load(d_each), a_now), offset = sub(zero(), mul(load(m_each), b_now));
      const F32x16 inv = inverse(scale);
      F32x16 loss = zero();
      for (int i = 0; i < size; i++) {
        const F32x16 miss = sub(sub(fit.batch.x[i], offset), mul(scale, fit.level(i, inv, offset)));
        loss = add(loss, mul(fit.batch.w[i], mul(miss, miss)));
      }
      best_a = select_less(loss, best_loss, a_now, best_a);
      best_b = select_less(loss, best_loss, b_now, best_b);
      best_loss = min(loss, best_loss);
    }
    store(a, best_a);
    store(b, best_b);
  }

  void assign(const AffineFit<size>& fit, F32x16* lanes, BlockSums* sums) const {
    alignas(64) float scale[16], offset[16];
    for (int j = 0; j < 16; j++) {
      scale[j] = half_value(d[j / kSubs]) * a[j];
      offset[j] = -(half_value(m[j / kSubs]) * b[j]);
    }
    const F32x16 inv = inverse(load(scale)), shift = load(offset);
    Sums s;
    for (int i = 0; i < size; i++) {
      lanes[i] = fit.level(i, inv, shift);
      const F32x16 wl = mul(fit.batch.w[i], lanes[i]);
      s.wl = add(s.wl, wl);
      s.wll = add(s.wll, mul(wl, lanes[i]));
      s.wxl = add(s.wxl, mul(wl, fit.batch.x[i]));
    }
    store(sums->wl, s.wl);
    store(sums->wll, s.wll);
    store(sums->wxl, s.wxl);
  }

  // The best d and m of block k for the levels and multiples there are; kept as they were where there is no such pair.
  void refit(int k, const BlockSums& s) {
    double aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;
    for (int j = k * kSubs; j < (k + 1) * kSubs; j++) {
      aa += double{a[j]} * a[j] * s.wll[j];
      ab += double{a[j]} * b[j] * s.wl[j];
      bb += double{b[j]} * b[j] * w[j];
      xa += double{a[j]} * s.wxl[j];
      xb += double{b[j]} * wx[j];
    }
    const double determinant = aa * bb - ab * ab;
    if (bb == 0 && aa > 0) d[k] = half_bits(static_cast<float>(xa / aa));
    if (determinant <= 1e-6 * aa * bb) return;
    const double best_d = (xa * bb - xb * ab) / determinant, best_m = (xa * ab - xb * aa) / determinant;
    if (best_d <= 0 || best_m < 0) return;
    d[k] = half_bits(static_cast<float>(best_d));
    m[k] = half_bits(static_cast<float>(best_m));
  }
};

// x = d * a * l in sixteen sub-blocks of 16, l from -n to n - 1, a from -top to top - 1. `levels` are l + n.
struct SymmetricBlock {
  alignas(64) float a[16] = {};
  uint16_t d;
  uint8_t levels[256];

  SymmetricBlock(const Batch<16>& batch, int n, int top) {
    const SymmetricFit<16> fit(batch, n);
    alignas(64) float scale[16], curvature[16];
    F32x16 lanes[16], bend;
    store(scale, fit.best(&bend));
    store(curvature, bend);
    d = half_bits(fit_scales(scale, curvature, 16, SignedMultiples{top}, a));
    refit(fit);
    const F32x16 inv = inverse(mul(broadcast(half_value(d)), load(a)));
    for (int i = 0; i < 16; i++) lanes[i] = add(fit.level(i, inv), broadcast(static_cast<float>(n)));
    store_levels<16>(lanes, levels);
  }

 private:
  void refit(const SymmetricFit<16>& fit) {
    const F32x16 multiples = load(a);
    const Sums s = fit.sums(inverse(mul(broadcast(half_value(d)), multiples)));
    const float xa = sum_tree(mul(s.wxl, multiples)), aa = sum_tree(mul(mul(s.wll, multiples), multiples));
    if (aa > 0) d = half_bits(xa / aa);
  }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
