// CUDA's dialect in plain C++, and the names of kernels/cuda/src/ptx.cuh: kernels compiled with it run on the CPU, with a
// GPU's results and without its speed. Compile with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstring>

#include "fibres.h"
#include "registry.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(threads)

#define threadIdx (::shim::current->thread)
#define blockIdx (::shim::block)
#define gridDim (::shim::grid.blocks)
#define blockDim (::shim::grid.threads)

#define KERNEL(threads, name, ...)                                                                       \
  static void name(__VA_ARGS__);                                                                         \
  static const ::shim::Registration shim_registration_##name(LLAMACLUST_MODULE "." #name, threads, name); \
  static void name(__VA_ARGS__)
#define KERNEL_IN_BLOCKS(threads, blocks, name, ...) KERNEL(threads, name, __VA_ARGS__)
#define SHARED(type, name, dimensions)  \
  static ::shim::SharedSlot slot_##name; \
  auto& name = slot_##name.get<type dimensions>()
#define DYNAMIC_SHARED (::shim::dynamic_shared())
#ifndef LLAMACLUST_ARCH
#define LLAMACLUST_ARCH 900
#endif
#define LLAMACLUST_WGMMA (LLAMACLUST_ARCH == 900)

#define SHIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace shim {

// One declaration of shared memory: the same place for all threads of a block, another one's garbage for the next block.
class SharedSlot {
 public:
  template <class T>
  T& get() {
    if (block_ != block_number) place_ = static_shared(sizeof(T));
    block_ = block_number;
    return *reinterpret_cast<T*>(place_);
  }

 private:
  uint64_t block_ = 0;
  uint8_t* place_ = nullptr;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace shim

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __int_as_float(int32_t bits) { return shim::bits_as<float>(bits); }
inline int32_t __float_as_int(float x) { return shim::bits_as<int32_t>(x); }
inline float __uint_as_float(uint32_t bits) { return shim::bits_as<float>(bits); }
inline uint32_t __float_as_uint(float x) { return shim::bits_as<uint32_t>(x); }
inline float __int2float_rn(int32_t x) { return static_cast<float>(x); }
// A GPU saturates and takes NaN for zero; the CPU's kernels are never given what does not fit, so here it is an error.
inline int32_t __float2int_rn(float x) {
  if (!(x > -0x1p31f && x < 0x1p31f)) shim::fail("a float that is no int32");
  return static_cast<int32_t>(__builtin_lrintf(x));
}
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t which = selector >> 4 * i & 15, byte = static_cast<uint32_t>(bytes >> 8 * (which & 7)) & 255;
    r |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return r;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }

// One thread runs at a time.
inline int32_t atomicAdd(int32_t* p, int32_t x) { return (*p += x) - x; }
inline uint32_t atomicAdd(uint32_t* p, uint32_t x) { return (*p += x) - x; }
inline int32_t atomicMax(int32_t* p, int32_t x) {
  const int32_t before = *p;
  *p = before > x ? before : x;
  return before;
}
inline void __threadfence() {}
inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_begin() {}
inline float load_from_all(const float* p) { return *p; }

#include "warp.h"
