// The operations of kernels/cpu/native/simd/lanes.h with a GPU thread as a lane. Every operation is one IEEE operation,
// and compilers do not fuse two of them.
#pragma once

namespace llamaclust::cuda {

using F32x16 = float;
using I32x16 = int32_t;

#define LANES __device__ __forceinline__

LANES float broadcast(float x) { return x; }
LANES int32_t broadcast(int32_t x) { return x; }
LANES float zero() { return 0.0f; }
LANES float add(float a, float b) { return __fadd_rn(a, b); }
LANES float sub(float a, float b) { return __fsub_rn(a, b); }
LANES float mul(float a, float b) { return __fmul_rn(a, b); }
LANES float div(float a, float b) { return __fdiv_rn(a, b); }
LANES float sqrt(float a) { return __fsqrt_rn(a); }
LANES float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }    // a * b + c
LANES float fnma(float a, float b, float c) { return __fmaf_rn(-a, b, c); }  // c - a * b
LANES float max(float a, float b) { return a > b ? a : b; }
LANES float min(float a, float b) { return a < b ? a : b; }
LANES int32_t add(int32_t a, int32_t b) { return a + b; }
LANES int32_t sub(int32_t a, int32_t b) { return a - b; }
LANES int32_t mul(int32_t a, int32_t b) { return a * b; }
template <int n>
LANES int32_t shift_left(int32_t a) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) << n);
}
LANES int32_t shift_right(int32_t a, int n) { return static_cast<int32_t>(static_cast<uint32_t>(a) >> n); }
LANES int32_t keep(int32_t a, int32_t mask) { return a & mask; }
LANES int32_t either(int32_t a, int32_t b) { return a | b; }
LANES float to_float(int32_t a) { return __int2float_rn(a); }
// Rounds to nearest, ties to even. The caller ensures |x| < 2^31.
LANES int32_t to_int(float a) { return __float2int_rn(a); }
LANES float bits_to_float(int32_t a) { return __int_as_float(a); }
LANES int32_t float_to_bits(float a) { return __float_as_int(a); }

#undef LANES

}  // namespace llamaclust::cuda
