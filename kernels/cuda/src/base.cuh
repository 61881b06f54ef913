// The basis of all kernels: how they are declared, and operations of lanes (simd/lanes.h). CUDA's part is in ptx.cuh;
// tests without a GPU use a header with the same names instead.
//
//   KERNEL(256, scale, const float* x, float factor, int32_t width, const int32_t* rows, float* out) { ... }
//
// declares a kernel for blocks of up to 256 threads. KERNEL_IN_BLOCKS(256, 3, scale, ...) limits its registers so that
// three such blocks fit on a multiprocessor. Arguments are pointers, int32_t, float and double. Static
// shared memory is SHARED(float, lanes, [64]), dynamic shared memory is uint8_t* p = DYNAMIC_SHARED; both are aligned
// to 16 bytes.
#pragma once

#ifdef LLAMACLUST_SHIM
#include "shim.h"
#else
#include "ptx.cuh"
#endif

#include "simd/lanes.h"

#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__

namespace llamaclust::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffff;

// Access four adjacent elements at once. p must be aligned to 16 bytes.
DEVICE float4 load_four(const float* p) { return *reinterpret_cast<const float4*>(p); }
DEVICE int4 load_four(const int32_t* p) { return *reinterpret_cast<const int4*>(p); }
DEVICE void store_four(float* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }

// Loads `count` adjacent elements, a multiple of four.
template <int count, class T>
DEVICE void load_fours(const T* p, T (&to)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const auto four = load_four(p + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// Reduces x over all lanes of a warp, or over `lanes` adjacent ones, by f: halves are joined, 16 + 16, ... 1 + 1. Every
// lane gets the result.
template <int lanes = kWarp, class T, class F>
DEVICE T reduce(T x, F f) {
#pragma unroll
  for (int with = lanes / 2; with > 0; with /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, with));
  return x;
}

// Replaces every NaN by the same one.
DEVICE float canonical(float x) { return x == x ? x : __int_as_float(0x7fc00000); }

}  // namespace llamaclust::cuda
