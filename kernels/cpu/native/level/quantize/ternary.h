// Types of three values: for models that were trained with such weights, so the largest of a block is its scale.
#pragma once

#include "level/quantize/k.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// The scale of a block, and levels 0 to 2 of its weights.
[[maybe_unused]] float ternary_levels(const float* x, uint8_t* levels) {
  float extent = 0;
  for (int i = 0; i < 256; i++) extent = std::max(extent, __builtin_fabsf(x[i]));
  const float half = 0.5f * extent;
  for (int i = 0; i < 256; i++) levels[i] = static_cast<uint8_t>(1 + (x[i] > half) - (x[i] < -half));
  return extent;
}

// Base-3 digits as a fraction of 256, rounded up so that multiplying gets the digits back.
[[maybe_unused]] uint8_t fraction(const uint8_t* digits, int count, int apart) {
  int number = 0;
  for (int i = 0; i < 5; i++) number = 3 * number + (i < count ? digits[i * apart] : 0);
  return static_cast<uint8_t>((number * 256 + 242) / 243);
}

// 160, 80 and 16 weights in 32, 16 and 4 bytes | d f16.
[[maybe_unused]] void quantize_tq1_0(const Source& from, uint8_t* out) {
  for (int64_t first = 0; first < from.count; first += 256, out += 54) {
    uint8_t levels[256];
    put_half(ternary_levels(from.x + first, levels), out + 52);
    for (int l = 0; l < 32; l++) out[l] = fraction(levels + l, 5, 32);
    for (int l = 0; l < 16; l++) out[32 + l] = fraction(levels + 160 + l, 5, 16);
    for (int l = 0; l < 4; l++) out[48 + l] = fraction(levels + 240 + l, 4, 4);
  }
}

// 256 x 2 bits, 128 weights in 32 bytes | d f16.
[[maybe_unused]] void quantize_tq2_0(const Source& from, uint8_t* out) {
  for (int64_t first = 0; first < from.count; first += 256, out += 66) {
    uint8_t levels[256];
    put_half(ternary_levels(from.x + first, levels), out + 64);
    put_pairs_of_bits(levels, 0, out);
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
