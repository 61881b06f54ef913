// What every kernel stands on: how kernels are declared, and the vocabulary of lanes (simd/lanes.h). CUDA's side is in
// ptx.cuh; without a GPU, tests bring a header of the same names.
//
//   KERNEL(256, scale, const float* x, float factor, int32_t width, const int32_t* rows, float* out) { ... }
//
// declares a kernel for blocks of up to 256 threads; KERNEL_IN_BLOCKS(256, 3, scale, ...) one that may use the registers
// which three such blocks on a multiprocessor have each. Arguments are pointers, int32_t, float and double. Static shared
// memory is SHARED(float, lanes, [64]), dynamic shared memory uint8_t* p = DYNAMIC_SHARED: both aligned to 16.
#pragma once

#ifdef LLAMACLUST_SHIM
#include "shim.h"
#else
#include "ptx.cuh"
#endif

#include "simd/lanes.h"

#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__  // not inlined

namespace llamaclust::cuda {

inline constexpr int kWarp = 32;
inline constexpr uint32_t kAllLanes = 0xffffffff;

// Four neighbours in one access of 16 bytes, to which p is aligned.
DEVICE float4 load_four(const float* p) { return *reinterpret_cast<const float4*>(p); }
DEVICE int4 load_four(const int32_t* p) { return *reinterpret_cast<const int4*>(p); }
DEVICE void store_four(float* p, float4 x) { *reinterpret_cast<float4*>(p) = x; }

// `count` neighbours, a multiple of four.
template <int count, class T>
DEVICE void load_fours(const T* p, T (&to)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const auto four = load_four(p + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// x of all lanes of a warp, or of `lanes` neighbours, by f: halves are joined, 16 + 16, ... 1 + 1. Every lane gets it.
template <int lanes = kWarp, class T, class F>
DEVICE T reduce(T x, F f) {
#pragma unroll
  for (int with = lanes / 2; with > 0; with /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, with));
  return x;
}

// Every NaN becomes the same one.
DEVICE float canonical(float x) { return x == x ? x : __int_as_float(0x7fc00000); }

}  // namespace llamaclust::cuda
