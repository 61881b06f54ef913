// Types with blocks of 32 weights that have one scale, or a scale and an offset; and types whose weights come from a
// table with uneven steps.
#pragma once

#include "level/quantize/fit.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Sixteen values rounded to float16: their bits, and their values as floats.
struct Halves {
  uint16_t bits[16];
  F32x16 values;
  explicit Halves(F32x16 x) {
    to_f16(bits, x);
    values = from_f16(bits);
  }
};

// Writes the lower four bits of 32 levels: levels 0 to 15 in the low nibbles, 16 to 31 in the high ones.
[[maybe_unused]] void put_nibbles(const uint8_t* levels, uint8_t* out) {
  for (int i = 0; i < 16; i++) out[i] = static_cast<uint8_t>((levels[i] & 15) | levels[16 + i] << 4);
}

// Writes `subs` blocks: float16 d; float16 m if there are offsets; 32 fifth bits if `bits` is 5; 32 nibbles.
template <int bits, typename F>
void put_blocks(const Halves& d, const Halves* m, F level, int subs, uint8_t* out) {
  uint8_t levels[512];
  store_levels<32>(level, levels);
  for (int j = 0; j < subs; j++, out += 16) {
    memcpy(out, d.bits + j, 2);
    out += 2;
    if (m) {
      memcpy(out, m->bits + j, 2);
      out += 2;
    }
    if (bits == 5) {
      uint32_t fifth = 0;
      for (int i = 0; i < 32; i++) fifth |= static_cast<uint32_t>(levels[32 * j + i] >> 4 & 1) << i;
      memcpy(out, &fifth, 4);
      out += 4;
    }
    put_nibbles(levels + 32 * j, out);
  }
}

// Coarser scales would clip the largest weight. They reduce the error by 1.3 % but increase the divergence from the
// unquantized model: 1.02 instead of 0.94 times that of ggml, over 24 chunks of WikiText-2.
constexpr int kKeepsLargest = -3;

template <int bits>
void quantize_symmetric(const Source& from, uint8_t* out) {
  constexpr int half = 1 << (bits - 1), block_bytes = 2 + (bits == 5 ? 4 : 0) + 16;
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t first, int subs) {
    const SymmetricFit<32> fit(batch, half);
    const Halves d(fit.best(from.has_importance ? -9 : kKeepsLargest).scale);
    const F32x16 inv = inverse(d.values);
    const auto level = [&](int i) { return add(fit.level(i, inv), broadcast(static_cast<float>(half))); };
    put_blocks<bits>(d, nullptr, level, subs, out + first * block_bytes);
  });
}
constexpr auto quantize_Q4_0 = quantize_symmetric<4>, quantize_Q5_0 = quantize_symmetric<5>;

template <int bits>
void quantize_affine(const Source& from, uint8_t* out) {
  constexpr int top = (1 << bits) - 1, block_bytes = 4 + (bits == 5 ? 4 : 0) + 16;
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t first, int subs) {
    const AffineFit<32> fit(batch, top, false);
    const auto line = fit.best(17, -0.8f, 0.1f);
    const Halves d(line.scale), m(line.offset);
    const F32x16 inv = inverse(d.values);
    put_blocks<bits>(d, &m, [&](int i) { return fit.level(i, inv, m.values); }, subs, out + first * block_bytes);
  });
}
constexpr auto quantize_Q4_1 = quantize_affine<4>, quantize_Q5_1 = quantize_affine<5>;

// File block: float16 d; 32 int8. With 255 levels, a search gains nothing.
[[maybe_unused]] void quantize_Q8_0(const Source& from, uint8_t* out) {
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t first, int subs) {
    F32x16 extent = zero();
    for (const F32x16 v : batch.x) extent = max(extent, max(v, sub(zero(), v)));
    const Halves d(mul(extent, broadcast(1.0f / 127.0f)));
    const F32x16 inv = inverse(d.values);
    uint8_t bytes[512];
    store_levels<32>([&](int i) { return clamp(rounded(mul(batch.x[i], inv)), -127, 127); }, bytes);
    for (int j = 0; j < subs; j++) {
      memcpy(out + (first + j) * 34, d.bits + j, 2);
      memcpy(out + (first + j) * 34 + 2, bytes + 32 * j, 32);
    }
  });
}

struct Table {
  int count;
  float value[16];
};

constexpr Table kUneven = {16, {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}};
constexpr Table kFloat4 = {8, {0, 1, 2, 3, 4, 6, 8, 12}};  // Magnitudes.

// Returns in each lane the table value nearest to x, and in *index its number.
INLINE F32x16 nearest(const Table& table, F32x16 x, F32x16* index) {
  F32x16 value = broadcast(table.value[0]), at = zero();
  for (int k = 1; k < table.count; k++) {
    const F32x16 border = broadcast(0.5f * (table.value[k - 1] + table.value[k]));
    value = select_less(border, x, broadcast(table.value[k]), value);
    at = add(at, select_less(border, x, broadcast(1.0f), zero()));
  }
  *index = at;
  return value;
}

// x = scale * value, with values of the uneven table.
struct TableFit {
  const Batch<32>& batch;

  Sums sums(F32x16 inv) const {
    F32x16 index;
    return sums_of(batch, [&](int i) { return nearest(kUneven, mul(batch.x[i], inv), &index); });
  }

  Scaled best() const {
    ScaleSearch<TableFit> search{*this};
    const F32x16 unit = inverse(largest(batch));
    const auto consider = [&](float value) { search.consider(mul(unit, broadcast(value))); };
    for (int k = -7; k <= 7; k++) consider(kUneven.value[0] + 1.5f * static_cast<float>(k));
    for (int k = -3; k <= 3; k++) consider(kUneven.value[15] + 3.0f * static_cast<float>(k));
    return search.best();
  }

  F32x16 level(int i, F32x16 inv) const {
    F32x16 index;
    nearest(kUneven, mul(batch.x[i], inv), &index);
    return index;
  }
};

[[maybe_unused]] void quantize_IQ4_NL(const Source& from, uint8_t* out) {
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t first, int subs) {
    const TableFit fit{batch};
    const Halves d(fit.best().scale);
    const F32x16 inv = inverse(d.values);
    put_blocks<4>(d, nullptr, [&](int i) { return fit.level(i, inv); }, subs, out + first * 18);
  });
}

// File block: float16 d; the upper two bits of eight scales; their lower four bits; 256 nibbles.
[[maybe_unused]] void put_iq4_xs(uint16_t d, const float* multiples, const uint8_t* levels, uint8_t* out) {
  memset(out, 0, 8);
  memcpy(out, &d, 2);
  for (int j = 0; j < 8; j++) {
    const int scale = static_cast<int>(multiples[j]) + 32;
    out[2 + j / 4] |= static_cast<uint8_t>(scale >> 4 << (j % 4 * 2));
    out[4 + j / 2] |= static_cast<uint8_t>((scale & 15) << (j % 2 * 4));
  }
  for (int j = 0; j < 8; j++) put_nibbles(levels + 32 * j, out + 8 + 16 * j);
}

[[maybe_unused]] void quantize_IQ4_XS(const Source& from, uint8_t* out) {
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t, int subs) {
    const TableFit fit{batch};
    alignas(64) float scale[16], curvature[16], multiple[16], xa[16], aa[16], each[16];
    const Scaled best = fit.best();
    store(scale, best.scale);
    store(curvature, best.curvature);
    float d[2];
    for (int k = 0; k < 2; k++)
      d[k] = as_half(fit_scales(scale + 8 * k, curvature + 8 * k, 8, Multiples::with_sign(32), multiple + 8 * k));
    for (int j = 0; j < 16; j++) each[j] = d[j / 8] * multiple[j];
    const Sums s = fit.sums(inverse(load(each)));
    store(xa, mul(s.wxl, load(multiple)));
    store(aa, mul(mul(s.wll, load(multiple)), load(multiple)));
    for (int k = 0; k < 2; k++) {
      float x_sum = 0, a_sum = 0;
      for (int j = 8 * k; j < 8 * k + 8; j++) {
        x_sum += xa[j];
        a_sum += aa[j];
      }
      if (a_sum > 0) d[k] = as_half(x_sum / a_sum);
    }
    for (int j = 0; j < 16; j++) each[j] = d[j / 8] * multiple[j];
    const F32x16 inv = inverse(load(each));
    uint8_t levels[512];
    store_levels<32>([&](int i) { return fit.level(i, inv); }, levels);
    for (int k = 0; k < subs / 8; k++, out += 136) put_iq4_xs(half_bits(d[k]), multiple + 8 * k, levels + 256 * k, out);
  });
}

// Sixteen exponents e, for scales 2^(e - 128). They bring the largest weight just into the range of values; `more` is
// added to them.
struct Exponents {
  alignas(64) float number[16], unit[16], inv[16];

  Exponents(F32x16 extent, int more) {
    alignas(64) int32_t exponent[16];
    store(exponent, shift_right(float_to_bits(extent), 23));
    for (int j = 0; j < 16; j++) {
      const int e = std::clamp(exponent[j] - 2 + more, 2, 252);
      number[j] = static_cast<float>(exponent[j] == 0 ? 0 : e);
      unit[j] = __builtin_ldexpf(1.0f, e - 128);
      inv[j] = __builtin_ldexpf(1.0f, 128 - e);
    }
  }

  F32x16 loss(const Batch<32>& batch) const {
    F32x16 loss = zero();
    for (int i = 0; i < 32; i++) {
      F32x16 index;
      const F32x16 magnitude = max(batch.x[i], sub(zero(), batch.x[i]));
      const F32x16 miss = sub(magnitude, mul(nearest(kFloat4, mul(magnitude, load(inv)), &index), load(unit)));
      loss = add(loss, mul(batch.w[i], mul(miss, miss)));
    }
    return loss;
  }
};

// File block: exponent byte; 32 nibbles of a sign and a three-bit float.
[[maybe_unused]] void quantize_MXFP4(const Source& from, uint8_t* out) {
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t first, int subs) {
    const F32x16 furthest = largest(batch), extent = max(furthest, sub(zero(), furthest));
    const Exponents low(extent, 0), high(extent, 1);
    const F32x16 low_loss = low.loss(batch), high_loss = high.loss(batch);
    const F32x16 number = select_less(high_loss, low_loss, load(high.number), load(low.number));
    const F32x16 inv = select_less(high_loss, low_loss, load(high.inv), load(low.inv));
    const auto level = [&](int i) {
      F32x16 index;
      nearest(kFloat4, mul(max(batch.x[i], sub(zero(), batch.x[i])), inv), &index);
      return add(index, select_less(batch.x[i], zero(), broadcast(8.0f), zero()));
    };
    uint8_t bytes[512];
    store_levels<32>(level, bytes);
    alignas(64) int32_t exponent[16];
    store(exponent, to_int(number));
    for (int j = 0; j < subs; j++) {
      uint8_t* block = out + (first + j) * 17;
      block[0] = static_cast<uint8_t>(exponent[j]);
      put_nibbles(bytes + 32 * j, block + 1);
    }
  });
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
