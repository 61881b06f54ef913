// Activations as int8 with one scale a segment (matrix.h says how each value comes about).
#pragma once

#include "matrix.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Below this a segment counts as zero: 127 / maximum would not be finite much further down.
constexpr float kSmallestMaximum = 0x1p-118f;

struct SegmentScale {
  float scale;
  float inverse;  // 0: every q is 0
};

template <int n>
inline __attribute__((always_inline)) SegmentScale scale_of(const float* x) {
  F32x16 maximum = zero(), defect = zero();
  for (int i = 0; i < n; i += 16) {
    const F32x16 v = load(x + i);
    maximum = max(max(v, sub(zero(), v)), maximum);
    defect = fma(v, zero(), defect);  // NaN where v is an infinity or a NaN
  }
  const float worst = sum_tree(defect), greatest = max_tree(maximum);
  if (worst != worst) return {__builtin_nanf(""), 0.0f};
  if (greatest < kSmallestMaximum) return {0.0f, 0.0f};
  return {greatest / 127.0f, 127.0f / greatest};
}

// Quantizes 16 values and returns their sum.
inline __attribute__((always_inline)) int32_t quantize_16(const float* x, float inverse, int8_t* out) {
  alignas(64) int32_t q[16] = {};
  if (inverse != 0.0f) store(q, to_int(mul(load(x), broadcast(inverse))));
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) {
    out[i] = static_cast<int8_t>(q[i]);
    sum += q[i];
  }
  return sum;
}

inline void quantize_segment(const float* x, Q8_32& out) {
  const SegmentScale s = scale_of<32>(x);
  out.scale = s.scale;
  out.sum = quantize_16(x, s.inverse, out.q) + quantize_16(x + 16, s.inverse, out.q + 16);
  out.scaled_sum = s.scale * static_cast<float>(out.sum);
}

inline void quantize_segment(const float* x, Q8_256& out) {
  const SegmentScale s = scale_of<256>(x);
  out.scale = s.scale;
  for (int i = 0; i < 16; i++) out.sums[i] = quantize_16(x + 16 * i, s.inverse, out.q + 16 * i);
  for (int j = 0; j < 8; j++) {
    const int32_t sum = out.sums[2 * j] + out.sums[2 * j + 1], high = (sum + 64) >> 7;
    out.sums_high[j] = static_cast<int8_t>(high);
    out.sums_low[j] = static_cast<int8_t>(sum - 128 * high);
  }
}

void quantize(ActivationFormat format, const float* x, int cols, void* out) {
  if (format == ActivationFormat::Q8_32)
    for (int s = 0; s < cols / 32; s++) quantize_segment(x + 32 * s, static_cast<Q8_32*>(out)[s]);
  else if (format == ActivationFormat::Q8_256)
    for (int s = 0; s < cols / 256; s++) quantize_segment(x + 256 * s, static_cast<Q8_256*>(out)[s]);
  else
    memcpy(out, x, static_cast<size_t>(cols) * sizeof(float));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
