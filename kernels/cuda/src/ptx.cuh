// The GPU part of base.cuh, for NVRTC, which has no headers of the standard library, and for nvcc.
#pragma once

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
#else
#include <cstdint>
#include <cstring>
#endif

#define KERNEL(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
#define KERNEL_IN_BLOCKS(threads, blocks, name, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#define SHARED(type, name, dimensions) __shared__ __align__(16) type name dimensions
#define DYNAMIC_SHARED (::llamaclust::cuda::dynamic_shared)
#define LLAMACLUST_ARCH __CUDA_ARCH__
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define LLAMACLUST_WGMMA 1  // Matrix instructions of four warps, which only compute capability 9.0 has.
#else
#define LLAMACLUST_WGMMA 0
#endif

namespace llamaclust::cuda {

extern __shared__ __align__(16) uint8_t dynamic_shared[];

__device__ __forceinline__ float half_to_float(uint16_t h) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
}
// Rounds to nearest, ties to even.
__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}

// c + two products: the int16s of a times the lower, or the upper, two bytes of b, all signed.
#define LLAMACLUST_DP2A(name, instruction)                                       \
  __device__ __forceinline__ int32_t name(int32_t a, int32_t b, int32_t c) {     \
    int32_t r;                                                                   \
    asm(instruction " %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));      \
    return r;                                                                    \
  }
LLAMACLUST_DP2A(dp2a_low, "dp2a.lo.s32.s32")
LLAMACLUST_DP2A(dp2a_high, "dp2a.hi.s32.s32")
#undef LLAMACLUST_DP2A

// c + four products: the unsigned or signed bytes of a times the signed bytes of b.
#define LLAMACLUST_DP4A(Register, type)                                                              \
  __device__ __forceinline__ int32_t dp4a(Register a, int32_t b, int32_t c) {                        \
    int32_t r;                                                                                       \
    asm("dp4a." type ".s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));                     \
    return r;                                                                                        \
  }
LLAMACLUST_DP4A(uint32_t, "u32")
LLAMACLUST_DP4A(int32_t, "s32")
#undef LLAMACLUST_DP4A

// d += a b over a whole warp. Each lane holds a part of the byte matrices (mma.cuh); a is unsigned or signed, b is
// signed. Products with 16 columns are only used with a signed a.
#define LLAMACLUST_MMA(Registers, type)                                                                             \
  __device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const Registers (&a)[4], const int32_t (&b)[2]) {   \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." type ".s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "      \
        "{%0, %1, %2, %3};"                                                                                         \
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                            \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                        \
  }                                                                                                                 \
  __device__ __forceinline__ void mma_m8n8k16(int32_t& d0, int32_t& d1, Registers a, int32_t b) {                   \
    asm("mma.sync.aligned.m8n8k16.row.col.s32." type ".s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"                      \
        : "+r"(d0), "+r"(d1)                                                                                        \
        : "r"(a), "r"(b));                                                                                          \
  }
LLAMACLUST_MMA(uint32_t, "u8")
LLAMACLUST_MMA(int32_t, "s8")
#undef LLAMACLUST_MMA
__device__ __forceinline__ void mma_m16n8k16(int32_t (&d)[4], const int32_t (&a)[2], const int32_t (&b)[1]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// Makes this thread's writes to shared memory visible to instructions that access it asynchronously: products of four
// warps, and bulk copies.
__device__ __forceinline__ void publish_shared() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}

#if LLAMACLUST_WGMMA
// Bytes in shared memory as operand b of products of four warps. Groups of eight rows are `group_bytes` apart; a group
// has sixteen columns of its rows, followed by sixteen more.
struct SharedOperand {
  uint64_t descriptor;
  __device__ __forceinline__ SharedOperand operator+(int bytes) const { return {descriptor + bytes / 16}; }
};
__device__ __forceinline__ SharedOperand shared_operand(const void* shared, int group_bytes) {
  const uint64_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) & 0x3ffff;
  return {at >> 4 | uint64_t{128 / 16} << 16 | static_cast<uint64_t>(group_bytes / 16) << 32};
}

// d += a b, or d = a b if `adds` is 0, with 64 rows (sixteen for each of four warps) by 64 or 128 columns. Each eight
// columns of d have the order of mma.cuh. The registers must not be used before `warpgroup_wait`; shared memory must be
// published first (`publish_shared`).
#define LLAMACLUST_WGMMA_D(i) "+r"(d[4 * i]), "+r"(d[4 * i + 1]), "+r"(d[4 * i + 2]), "+r"(d[4 * i + 3])
#define LLAMACLUST_WGMMA_64(Registers, type)                                                                           \
  __device__ __forceinline__ void multiply_k32_by_four(int32_t (&d)[32], const Registers (&a)[4], SharedOperand b, int adds) { \
    asm volatile(                                                                                                      \
        "{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32." type ".s8 "               \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "             \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                                                     \
        "{%32, %33, %34, %35}, %36, p; }"                                                                              \
        : LLAMACLUST_WGMMA_D(0), LLAMACLUST_WGMMA_D(1), LLAMACLUST_WGMMA_D(2), LLAMACLUST_WGMMA_D(3),                  \
          LLAMACLUST_WGMMA_D(4), LLAMACLUST_WGMMA_D(5), LLAMACLUST_WGMMA_D(6), LLAMACLUST_WGMMA_D(7)                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(adds));                                   \
  }
#define LLAMACLUST_WGMMA_128(Registers, type)                                                                          \
  __device__ __forceinline__ void multiply_k32_by_four(int32_t (&d)[64], const Registers (&a)[4], SharedOperand b, int adds) { \
    asm volatile(                                                                                                      \
        "{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k32.s32." type ".s8 "              \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "             \
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "              \
        "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "              \
        "%59, %60, %61, %62, %63}, "                                                                                   \
        "{%64, %65, %66, %67}, %68, p; }"                                                                              \
        : LLAMACLUST_WGMMA_D(0), LLAMACLUST_WGMMA_D(1), LLAMACLUST_WGMMA_D(2), LLAMACLUST_WGMMA_D(3),                  \
          LLAMACLUST_WGMMA_D(4), LLAMACLUST_WGMMA_D(5), LLAMACLUST_WGMMA_D(6), LLAMACLUST_WGMMA_D(7),                  \
          LLAMACLUST_WGMMA_D(8), LLAMACLUST_WGMMA_D(9), LLAMACLUST_WGMMA_D(10), LLAMACLUST_WGMMA_D(11),                \
          LLAMACLUST_WGMMA_D(12), LLAMACLUST_WGMMA_D(13), LLAMACLUST_WGMMA_D(14), LLAMACLUST_WGMMA_D(15)               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(adds));                                   \
  }
LLAMACLUST_WGMMA_64(uint32_t, "u8")
LLAMACLUST_WGMMA_64(int32_t, "s8")
LLAMACLUST_WGMMA_128(uint32_t, "u8")
LLAMACLUST_WGMMA_128(int32_t, "s8")
#undef LLAMACLUST_WGMMA_64
#undef LLAMACLUST_WGMMA_128
#undef LLAMACLUST_WGMMA_D
__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
// Waits until at most the newest `groups` groups are in flight.
template <int groups>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(groups) : "memory");
}
#endif

// Loads what another block of the same launch has written and published by __threadfence.
__device__ __forceinline__ float load_from_all(const float* p) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
}

// Named barriers 0 (that of __syncthreads) to 15 for `threads` threads, in whole warps. Warps that only arrive do not
// wait. The number is a constant, because a number in a register would reserve all sixteen barriers; a multiprocessor
// has 64, or from 12.0 on 24.
template <int barrier, int threads>
__device__ __forceinline__ void barrier_wait() {
  asm volatile("barrier.sync.aligned %0, %1;" : : "n"(barrier), "n"(threads) : "memory");
}
template <int barrier, int threads>
__device__ __forceinline__ void barrier_arrive() {
  asm volatile("barrier.arrive.aligned %0, %1;" : : "n"(barrier), "n"(threads) : "memory");
}

// The variants with a number in a register, for kernels with one block per multiprocessor.
__device__ __forceinline__ void barrier_wait_at(int barrier, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive_at(int barrier, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" : : "r"(barrier), "r"(threads) : "memory");
}

// Overlap of launches, from compute capability 9.0. A kernel that calls `wait_for_earlier_kernels` starts once all
// blocks of the previous kernel have called `let_next_kernel_begin` or ended. Before that wait it must not write to
// global memory, and may read only weights, arguments, and what was written before the last launch that did not
// overlap: plans of attention, angles of rotations (executor/emit.py), keys and values of earlier steps. At least one
// of its threads must wait, or later kernels would not be ordered after earlier ones.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Prefetches the 128 bytes around p into the L2 cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }

// An address in shared memory that stays in a register. From a pointer, it would be computed again for each use, with
// four instructions on 9.0.
struct SharedAddress {
  uint32_t bytes;
  __device__ __forceinline__ SharedAddress operator+(int by) const { return {bytes + by}; }
};
__device__ __forceinline__ SharedAddress shared_address(void* shared) {
  SharedAddress to;
  asm volatile("{ .reg .u64 x; cvta.to.shared.u64 x, %1; cvt.u32.u64 %0, x; }" : "=r"(to.bytes) : "l"(shared));
  return to;
}

// Copy sixteen bytes, or four, from global to shared memory, in the background from compute capability 8.0. The copies
// since the last commit are a group; copy_async_wait<n> waits until at most the newest n groups are in flight.
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to.bytes), "l"(global) : "memory");
#else
  const uint4 x = *static_cast<const uint4*>(global);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               : : "r"(to.bytes), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#endif
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  copy_async_16({static_cast<uint32_t>(__cvta_generic_to_shared(shared))}, global);
}
__device__ __forceinline__ void copy_async_4(SharedAddress to, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(to.bytes), "l"(global) : "memory");
#else
  const uint32_t x = *static_cast<const uint32_t*>(global);
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(to.bytes), "r"(x) : "memory");
#endif
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global) {
  copy_async_4({static_cast<uint32_t>(__cvta_generic_to_shared(shared))}, global);
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(groups) : "memory");
#endif
}

// Bytes of the block's dynamic shared memory.
__device__ __forceinline__ int dynamic_shared_bytes() {
  int bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

#if __CUDA_ARCH__ >= 900
// Bulk copies of any multiple of 16 bytes, requested by one thread, from compute capability 9.0. An arrival (8 bytes of
// shared memory) completes a phase when all bytes that were announced to it have arrived. A phase consists of one
// announcement, all copies that name the arrival, and `others` calls of copy_async_arrive. Phases have parity 0, 1, 0,
// ...
__device__ __forceinline__ void arrival_init(SharedAddress arrival, int others = 0) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(arrival.bytes), "r"(1 + others) : "memory");
}
// Arrives once the earlier copy_async copies of this thread are complete.
__device__ __forceinline__ void copy_async_arrive(SharedAddress arrival) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(arrival.bytes) : "memory");
}
__device__ __forceinline__ void arrival_announce(SharedAddress arrival, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(arrival.bytes), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(SharedAddress to, const void* global, int bytes, SharedAddress arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               : : "r"(to.bytes), "l"(global), "r"(bytes), "r"(arrival.bytes) : "memory");
}
__device__ __forceinline__ void arrival_wait(SharedAddress arrival, int parity) {
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(arrival.bytes), "r"(parity) : "memory");
  } while (done == 0);
}
// Counts calls in a counter in shared memory, which starts at 0. Returns true for the last of `of` calls, which sees
// what the other callers wrote before. Then the counter restarts.
__device__ __forceinline__ bool is_last(SharedAddress counter, int of) {
  uint32_t before;
  asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
               : "=r"(before) : "r"(counter.bytes), "r"(of - 1) : "memory");
  return before == static_cast<uint32_t>(of - 1);
}
#endif

}  // namespace llamaclust::cuda
