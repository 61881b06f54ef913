// Blocks of 256 weights of the K types in a model file. Sub-blocks have scales, and in some types offsets, that are
// multiples of the block's own. Also ternary types.
#pragma once

#include "level/quantize/fit.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Sums of the sub-blocks with fixed levels, from which the block's scales are fitted again.
struct alignas(64) BlockSums {
  float wl[16], wll[16], wxl[16];
};

// x = d * a * l - m * b in sixteen sub-blocks of `size`, of one block or two. a and b are small integers.
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
    const Sums s = sums_of(batch, level_of(fit));
    BlockSums sums;
    store(sums.wl, s.wl);
    store(sums.wll, s.wll);
    store(sums.wxl, s.wxl);
    for (int k = 0; k < kBlocks; k++) refit(k, sums);
    store_levels<size>(level_of(fit), levels);
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
      d[k] = half_bits(fit_scales(scale + j, curvature + j, kSubs, Multiples::up_to(static_cast<float>(top)), a + j));
      m[k] = half_bits(fit_scales(offset + j, w + j, kSubs, Multiples::up_to(static_cast<float>(top)), b + j));
    }
  }

  // Tries neighbouring pairs of multiples. If there are few multiples, rounding each independently is far from the
  // best.
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

  // Returns a function of the levels at the current scales and offsets.
  auto level_of(const AffineFit<size>& fit) const {
    alignas(64) float scale[16], offset[16];
    for (int j = 0; j < 16; j++) {
      scale[j] = half_value(d[j / kSubs]) * a[j];
      offset[j] = -(half_value(m[j / kSubs]) * b[j]);
    }
    return [&fit, inv = inverse(load(scale)), shift = load(offset)](int i) { return fit.level(i, inv, shift); };
  }

  // Finds the best d and m of block k for the current levels and multiples. Keeps the old ones if there is no solution.
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

// x = d * a * l in sixteen sub-blocks of 16, with l from -n to n - 1 and a from -top to top - 1. `levels` are l + n.
struct SymmetricBlock {
  alignas(64) float a[16] = {};
  uint16_t d;
  uint8_t levels[256];

  SymmetricBlock(const Batch<16>& batch, int n, int top) {
    const SymmetricFit<16> fit(batch, n);
    alignas(64) float scale[16], curvature[16];
    const Scaled best = fit.best();
    store(scale, best.scale);
    store(curvature, best.curvature);
    d = half_bits(fit_scales(scale, curvature, 16, Multiples::with_sign(static_cast<float>(top)), a));
    refit(fit);
    const F32x16 inv = inverse(mul(broadcast(half_value(d)), load(a)));
    store_levels<16>([&](int i) { return add(fit.level(i, inv), broadcast(static_cast<float>(n))); }, levels);
  }

 private:
  void refit(const SymmetricFit<16>& fit) {
    const F32x16 multiples = load(a);
    const Sums s = fit.sums(inverse(mul(broadcast(half_value(d)), multiples)));
    const float xa = sum_tree(mul(s.wxl, multiples)), aa = sum_tree(mul(mul(s.wll, multiples), multiples));
    if (aa > 0) d = half_bits(xa / aa);
  }
};

// Writes two bits, starting at bit `shift`, of 256 levels. In each half of 128, byte l of 32 holds those of levels l, l
// + 32, l + 64 and l + 96.
[[maybe_unused]] void put_pairs_of_bits(const uint8_t* levels, int shift, uint8_t* out) {
  for (int half = 0; half < 2; half++)
    for (int l = 0; l < 32; l++) {
      const uint8_t* at = levels + 128 * half + l;
      const auto pair = [&](int i) { return (at[32 * i] >> shift & 3) << (2 * i); };
      out[32 * half + l] = static_cast<uint8_t>(pair(0) | pair(1) | pair(2) | pair(3));
    }
}

// Writes bit `shift` of 256 levels. Bit i of byte l belongs to level 32i + l.
[[maybe_unused]] void put_bits(const uint8_t* levels, int shift, uint8_t* out) {
  for (int l = 0; l < 32; l++) {
    int byte = 0;
    for (int i = 0; i < 8; i++) byte |= (levels[32 * i + l] >> shift & 1) << i;
    out[l] = static_cast<uint8_t>(byte);
  }
}

// Writes four bits of each level. Of every 2 * `run` levels, the first half is in the low nibbles.
[[maybe_unused]] void put_low_bits(const uint8_t* levels, int run, uint8_t* out) {
  for (int first = 0; first < 256; first += 2 * run, out += run)
    for (int l = 0; l < run; l++)
      out[l] = static_cast<uint8_t>((levels[first + l] & 15) | (levels[first + run + l] & 15) << 4);
}

// Writes eight scales and eight offsets of six bits: the first four of each in whole bytes, whose upper two bits are
// those of the others.
[[maybe_unused]] void put_six_bit_pairs(const float* a, const float* b, uint8_t* out) {
  for (int j = 0; j < 4; j++) {
    const int a0 = static_cast<int>(a[j]), b0 = static_cast<int>(b[j]);
    const int a1 = static_cast<int>(a[j + 4]), b1 = static_cast<int>(b[j + 4]);
    out[j] = static_cast<uint8_t>(a0 | a1 >> 4 << 6);
    out[j + 4] = static_cast<uint8_t>(b0 | b1 >> 4 << 6);
    out[j + 8] = static_cast<uint8_t>((a1 & 15) | (b1 & 15) << 4);
  }
}

[[maybe_unused]] void quantize_Q2_K(const Source& from, uint8_t* out) {
  each_batch<16>(from, [&](const Batch<16>& batch, int64_t, int) {
    const AffineBlocks<16> block(batch, 3, 15, 17, -0.32f, 0.08f);  // The range is chosen as in kKeepsLargest.
    for (int j = 0; j < 16; j++)
      out[j] = static_cast<uint8_t>(static_cast<int>(block.a[j]) | static_cast<int>(block.b[j]) << 4);
    put_pairs_of_bits(block.levels, 0, out + 16);
    memcpy(out + 80, block.d, 2);
    memcpy(out + 82, block.m, 2);
    out += 84;
  });
}

[[maybe_unused]] void quantize_Q3_K(const Source& from, uint8_t* out) {
  each_batch<16>(from, [&](const Batch<16>& batch, int64_t, int) {
    const SymmetricBlock block(batch, 4, 32);
    put_bits(block.levels, 2, out);
    put_pairs_of_bits(block.levels, 0, out + 32);
    memset(out + 96, 0, 12);
    for (int j = 0; j < 16; j++) {
      const int scale = static_cast<int>(block.a[j]) + 32;
      out[96 + j % 8] |= static_cast<uint8_t>((scale & 15) << (j / 8 * 4));
      out[104 + j % 4] |= static_cast<uint8_t>(scale >> 4 << (j / 4 * 2));
    }
    memcpy(out + 108, &block.d, 2);
    out += 110;
  });
}

template <bool five_bits>
void quantize_q45_k(const Source& from, uint8_t* out) {
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t, int subs) {
    const AffineBlocks<32> blocks(batch, five_bits ? 31 : 15, 63, 17, -0.8f, 0.1f);
    for (int k = 0; k < subs / 8; k++) {
      memcpy(out, blocks.d + k, 2);
      memcpy(out + 2, blocks.m + k, 2);
      put_six_bit_pairs(blocks.a + 8 * k, blocks.b + 8 * k, out + 4);
      const uint8_t* levels = blocks.levels + 256 * k;
      if (five_bits) put_bits(levels, 4, out + 16);
      put_low_bits(levels, 32, out + (five_bits ? 48 : 16));
      out += five_bits ? 176 : 144;
    }
  });
}

constexpr auto quantize_Q4_K = quantize_q45_k<false>, quantize_Q5_K = quantize_q45_k<true>;

[[maybe_unused]] void quantize_Q6_K(const Source& from, uint8_t* out) {
  each_batch<16>(from, [&](const Batch<16>& batch, int64_t, int) {
    const SymmetricBlock block(batch, 32, 128);
    put_low_bits(block.levels, 64, out);
    put_pairs_of_bits(block.levels, 4, out + 128);
    for (int j = 0; j < 16; j++) out[192 + j] = static_cast<uint8_t>(static_cast<int>(block.a[j]));
    memcpy(out + 208, &block.d, 2);
    out += 210;
  });
}

// Quantizes a block to levels 0 to 2 and returns its scale, the maximum magnitude. Models with ternary types are
// trained with such weights.
[[maybe_unused]] float ternary_levels(const float* x, uint8_t* levels) {
  float extent = 0;
  for (int i = 0; i < 256; i++) extent = std::max(extent, __builtin_fabsf(x[i]));
  const float half = 0.5f * extent;
  for (int i = 0; i < 256; i++) levels[i] = static_cast<uint8_t>(1 + (x[i] > half) - (x[i] < -half));
  return extent;
}

// Encodes five base-3 digits as a fraction of 256, rounded up so that multiplication recovers the digits.
[[maybe_unused]] uint8_t fraction(const uint8_t* digits, int count, int apart) {
  int number = 0;
  for (int i = 0; i < 5; i++) number = 3 * number + (i < count ? digits[i * apart] : 0);
  return static_cast<uint8_t>((number * 256 + 242) / 243);
}

// File block: base-3 digits of 160, 80 and 16 weights in 32, 16 and 4 bytes; float16 d.
[[maybe_unused]] void quantize_TQ1_0(const Source& from, uint8_t* out) {
  for (int64_t first = 0; first < from.count; first += 256, out += 54) {
    uint8_t levels[256];
    put_half(ternary_levels(from.x + first, levels), out + 52);
    for (int l = 0; l < 32; l++) out[l] = fraction(levels + l, 5, 32);
    for (int l = 0; l < 16; l++) out[32 + l] = fraction(levels + 160 + l, 5, 16);
    for (int l = 0; l < 4; l++) out[48 + l] = fraction(levels + 240 + l, 4, 4);
  }
}

// File block: two bits per weight, 128 weights in 32 bytes; float16 d.
[[maybe_unused]] void quantize_TQ2_0(const Source& from, uint8_t* out) {
  for (int64_t first = 0; first < from.count; first += 256, out += 66) {
    uint8_t levels[256];
    put_half(ternary_levels(from.x + first, levels), out + 64);
    put_pairs_of_bits(levels, 0, out);
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
