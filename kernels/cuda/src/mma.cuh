// Products of 8-bit matrices by a warp: d[16][8] += a[16][k] b[k][8], on GPUs of any age with the same (exact) result.
//
// With row = lane / 4 and column = lane % 4:
//   a[0]: a[row][4 column + 0..3]     a[1]: a[row + 8][the same]     a[2], a[3] (k = 32): the same rows, 16 columns on
//   b[0]: b[4 column + 0..3][row]     b[1] (k = 32): 16 rows on
//   d[0], d[1]: d[row][2 column], d[row][2 column + 1]               d[2], d[3]: row + 8
// Four values are the bytes of a register, the first the lowest. Of a, uint32_t holds unsigned bytes and int32_t signed
// ones; b is signed.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

template <class Registers>
DEVICE void multiply_k32(int32_t (&d)[4], const Registers (&a)[4], const int32_t (&b)[2]) {
#if LLAMACLUST_ARCH >= 800
  mma_m16n8k32(d, a, b);
#else
  mma_m8n8k16(d[0], d[1], a[0], b[0]);
  mma_m8n8k16(d[2], d[3], a[1], b[0]);
  mma_m8n8k16(d[0], d[1], a[2], b[1]);
  mma_m8n8k16(d[2], d[3], a[3], b[1]);
#endif
}

template <class Registers>
DEVICE void multiply_k16(int32_t (&d)[4], const Registers (&a)[2], const int32_t (&b)[1]) {
#if LLAMACLUST_ARCH >= 800
  mma_m16n8k16(d, a, b);
#else
  mma_m8n8k16(d[0], d[1], a[0], b[0]);
  mma_m8n8k16(d[2], d[3], a[1], b[0]);
#endif
}

}  // namespace llamaclust::cuda
