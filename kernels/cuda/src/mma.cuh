// Products of 8-bit matrices by a warp: d[16][8] += a[16][k] b[k][8]. All GPUs give the same (exact) result.
//
// With row = lane / 4 and column = lane % 4:
//   a[0]: a[row][4 column + 0..3]     a[1]: a[row + 8][the same]     a[2], a[3] (k = 32): 16 columns further
//   b[0]: b[4 column + 0..3][row]     b[1] (k = 32): 16 rows further
//   d[0], d[1]: d[row][2 column], d[row][2 column + 1]               d[2], d[3]: row + 8
// A register has four values as bytes, the first in the lowest byte. uint32_t registers of a (k = 32) have unsigned
// bytes and int32_t registers signed ones; b is signed. `one` says that all columns of b are equal, and that only
// d[row][0] is needed.
//
// GPUs without 8-bit matrix instructions (before compute capability 7.5) multiply four bytes at a time. Lanes exchange
// the operands with eight shuffles for eight such products, or, if all columns are equal, two for every two rows.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

#if LLAMACLUST_ARCH < 750
template <int parts, class Registers>
DEVICE void multiply_parts(int32_t (&d)[4], const Registers (&a)[2 * parts], const int32_t (&b)[parts], bool one) {
  const int lane = threadIdx.x % kWarp, column = lane % 4;
  if (one) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int32_t sum = 0;
#pragma unroll
      for (int part = 0; part < parts; part++) sum = dp4a(a[2 * part + half], b[part], sum);
      d[2 * half] += reduce<4>(sum, [](int32_t x, int32_t y) { return x + y; });
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < parts; part++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int32_t even = __shfl_sync(kAllLanes, b[part], 8 * column + i);
      const int32_t odd = __shfl_sync(kAllLanes, b[part], 8 * column + 4 + i);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Registers row = __shfl_sync(kAllLanes, a[2 * part + half], lane - column + i);
        d[2 * half] = dp4a(row, even, d[2 * half]);
        d[2 * half + 1] = dp4a(row, odd, d[2 * half + 1]);
      }
    }
}
#endif

template <class Registers>
DEVICE void multiply_k32(int32_t (&d)[4], const Registers (&a)[4], const int32_t (&b)[2], bool one = false) {
#if LLAMACLUST_ARCH >= 800
  mma_m16n8k32(d, a, b);
#elif LLAMACLUST_ARCH < 750
  multiply_parts<2>(d, a, b, one);
#else
  mma_m8n8k16(d[0], d[1], a[0], b[0]);
  mma_m8n8k16(d[2], d[3], a[1], b[0]);
  mma_m8n8k16(d[0], d[1], a[2], b[1]);
  mma_m8n8k16(d[2], d[3], a[3], b[1]);
#endif
}

DEVICE void multiply_k16(int32_t (&d)[4], const int32_t (&a)[2], const int32_t (&b)[1], bool one = false) {
#if LLAMACLUST_ARCH >= 800
  mma_m16n8k16(d, a, b);
#elif LLAMACLUST_ARCH < 750
  multiply_parts<1>(d, a, b, one);
#else
  mma_m8n8k16(d[0], d[1], a[0], b[0]);
  mma_m8n8k16(d[2], d[3], a[1], b[0]);
#endif
}

}  // namespace llamaclust::cuda
