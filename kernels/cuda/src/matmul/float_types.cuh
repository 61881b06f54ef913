// Types of float weights.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {
namespace {

// A tile consists of columns of sixteen values, which are widened exactly.
struct F32 {
  using Stored = float;
  static constexpr int kBytes = 4;
  static DEVICE float widened(float x) { return x; }
  static DEVICE float value(const uint8_t* p) { return *reinterpret_cast<const float*>(p); }
  static DEVICE float4 four(const uint8_t* p) { return *reinterpret_cast<const float4*>(p); }
};

struct F16 {
  using Stored = uint16_t;
  static constexpr int kBytes = 2;
  static DEVICE float widened(uint16_t x) { return half_to_float(x); }
  static DEVICE float value(const uint8_t* p) { return widened(*reinterpret_cast<const uint16_t*>(p)); }
  static DEVICE float4 four(const uint8_t* p) { return {value(p), value(p + 2), value(p + 4), value(p + 6)}; }
};

struct BF16 {
  using Stored = uint16_t;
  static constexpr int kBytes = 2;
  static DEVICE float widened(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
  static DEVICE float value(const uint8_t* p) { return widened(*reinterpret_cast<const uint16_t*>(p)); }
  static DEVICE float4 four(const uint8_t* p) { return {value(p), value(p + 2), value(p + 4), value(p + 6)}; }
};

template <class Type>
constexpr int kColumnBytes = 16 * Type::kBytes;

}  // namespace
}  // namespace llamaclust::cuda
