// Types of 32 weights with one scale, or one scale and an offset, a block.
#pragma once

#include "level/quantize/fit.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Halves of sixteen values, and what those are.
struct Halves {
  uint16_t bits[16];
  F32x16 values;
  explicit Halves(F32x16 x) {
    to_f16(bits, x);
    values = from_f16(bits);
  }
};

// The lower four bits of 32 levels, those of 0 to 15 below those of 16 to 31.
[[maybe_unused]] void put_nibbles(const uint8_t* levels, uint8_t* out) {
  for (int i = 0; i < 16; i++) out[i] = static_cast<uint8_t>((levels[i] & 15) | levels[16 + i] << 4);
}

// The fifth bits of 32 levels.
[[maybe_unused]] void put_fifth_bits(const uint8_t* levels, uint8_t* out) {
  uint32_t word = 0;
  for (int i = 0; i < 32; i++) word |= static_cast<uint32_t>(levels[i] >> 4 & 1) << i;
  memcpy(out, &word, 4);
}

// Of each of `subs` blocks: d f16 | m f16 where there is an offset | 32 fifth bits where there are | 32 x 4 bits.
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
      put_fifth_bits(levels + 32 * j, out);
      out += 4;
    }
    put_nibbles(levels + 32 * j, out);
  }
}

// Coarser scales would take the outermost level from the largest weight. That makes the error less, but a model that is
// quantized so predicts worse (docs/quantize.md).
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

// d f16 | 32 x int8. With 255 levels there is nothing to gain from a search.
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

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
