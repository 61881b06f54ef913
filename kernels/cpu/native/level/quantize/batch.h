// Sixteen sub-blocks side by side, one in each lane, so that searches in them need no sums across lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "level/quantize_ops.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Element i of sub-block j is x[i], lane j. Lanes beyond the end of the data are all zero.
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

// Calls f(batch, first, subs) for every sixteen sub-blocks: `subs` of them are there, from `first` on.
template <int size, typename F>
void each_batch(const Source& from, F f) {
  for (int64_t first = 0; first < from.count / size; first += 16) {
    const int64_t subs = std::min<int64_t>(16, from.count / size - first);
    f(Batch<size>(from.x + first * size, from.w + first * size, subs), first, static_cast<int>(subs));
  }
}

// Levels as lanes -> bytes [16 * size], in the order of the data.
template <int size>
void store_levels(const F32x16* levels, uint8_t* out) {
  alignas(64) int32_t lanes[size][16];
  for (int i = 0; i < size; i++) store(lanes[i], to_int(levels[i]));
  for (int j = 0; j < 16; j++)
    for (int i = 0; i < size; i++) out[j * size + i] = static_cast<uint8_t>(lanes[i][j]);
}

[[maybe_unused]] F32x16 rounded(F32x16 x) { return to_float(to_int(x)); }
[[maybe_unused]] F32x16 clamp(F32x16 x, float low, float high) { return min(max(x, broadcast(low)), broadcast(high)); }
// x / y, and 0 where y is not above zero.
[[maybe_unused]] F32x16 ratio(F32x16 x, F32x16 y) {
  return select_less(zero(), y, div(x, select_less(zero(), y, y, broadcast(1.0f))), zero());
}
// 1 / x, and 0 for 0.
[[maybe_unused]] F32x16 inverse(F32x16 x) {
  const F32x16 size = max(x, sub(zero(), x));
  return select_less(zero(), size, div(broadcast(1.0f), select_less(zero(), size, x, broadcast(1.0f))), zero());
}

[[maybe_unused]] uint16_t half_bits(float x) {
  uint16_t halves[16];
  to_f16(halves, broadcast(x));
  return halves[0];
}
[[maybe_unused]] float half_value(uint16_t bits) {
  uint16_t halves[16];
  float values[16];
  for (uint16_t& half : halves) half = bits;
  store(values, from_f16(halves));
  return values[0];
}
// What x becomes as a half.
[[maybe_unused]] float as_half(float x) { return half_value(half_bits(x)); }
[[maybe_unused]] void put_half(float x, uint8_t* out) {
  const uint16_t bits = half_bits(x);
  memcpy(out, &bits, 2);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
