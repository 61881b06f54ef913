// Sixteen float32 or int32 lanes on every instruction set: the operations in which level code is written. Each is one
// IEEE 754 operation per lane (fma rounds once), so all levels give the same bits. LLAMACLUST_LEVEL is the name of the
// namespace. The compiler's own macros select the implementation, except LLAMACLUST_NEON: every ARMv8 compiler has
// NEON, also for the generic level.
#pragma once

#ifndef LLAMACLUST_LEVEL
#error "level code is compiled with -DLLAMACLUST_LEVEL=<name>"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#define INLINE [[maybe_unused]] inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "simd/avx512/lanes.h"
#elif defined(__AVX2__)
#include "simd/avx2/lanes.h"
#elif defined(LLAMACLUST_NEON)
#include "simd/neon/lanes.h"
#else
#include "simd/generic/lanes.h"
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Loads lanes [0, n) from memory; the others are 0.
[[maybe_unused]] F32x16 load_first(int n, const float* p) {
  alignas(64) float v[16] = {};
  memcpy(v, p, static_cast<size_t>(n) * sizeof(float));
  return load(v);
}

[[maybe_unused]] void store_first(int n, float* p, F32x16 x) {
  alignas(64) float v[16];
  store(v, x);
  memcpy(p, v, static_cast<size_t>(n) * sizeof(float));
}

// Convert x to the nearest float16, and back.
INLINE uint16_t half_bits(float x) {
  alignas(64) uint16_t halves[16];
  to_f16(halves, broadcast(x));
  return halves[0];
}
INLINE float half_value(uint16_t bits) {
  alignas(64) uint16_t halves[16] = {bits};
  alignas(64) float values[16];
  store(values, from_f16(halves));
  return values[0];
}

// Adds sixteen lanes in a fixed tree of halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
[[maybe_unused]] float sum_tree(F32x16 x) {
  alignas(64) float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

[[maybe_unused]] float max_tree(F32x16 x) {
  alignas(64) float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
