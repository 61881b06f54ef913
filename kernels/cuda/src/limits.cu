// Peak rates of a GPU: memory reads and 8-bit multiply-accumulates. A result is written only if it equals a number that
// does not occur, so that compilers keep the work.
#include "mma.cuh"

namespace llamaclust::cuda {

constexpr int32_t kNever = 0x5f3759df;

// Reads `pieces` pieces of 64 KiB. Grid: any size.
KERNEL(256, read, const uint8_t* __restrict__ x, int32_t pieces, int32_t* out) {
  uint32_t seen = 0;
  for (int32_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const uint4* p = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(piece) * 65536);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const uint4 a = p[256 * i + threadIdx.x];
      seen ^= a.x ^ a.y ^ a.z ^ a.w;
    }
  }
  if (static_cast<int32_t>(seen) == kNever) *out = kNever;
}

DEVICE void multiply_once(int32_t (&d)[4], const int32_t (&a)[4], const int32_t (&b)[2]) {
#if LLAMACLUST_ARCH < 750
#pragma unroll
  // Needs no exchange of operands between lanes.
  for (int i = 0; i < 32; i++) d[i % 4] = dp4a(a[i % 4], b[i / 4 % 2], d[i % 4]);
#else
  multiply_k32(d, a, b);
#endif
}

// Each warp computes 8 products of 16 x 32 by 32 x 8 per round. Grid: any size.
KERNEL(256, multiply, int32_t rounds, int32_t* out) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x);
  const int32_t a[4] = {lane, lane + 1, lane + 2, lane + 3}, b[2] = {lane, lane + 5};
  int32_t d[8][4] = {};
  for (int round = 0; round < rounds; round++)
#pragma unroll
    for (int i = 0; i < 8; i++) multiply_once(d[i], a, b);
  int32_t sum = 0;
  for (int i = 0; i < 8; i++) sum ^= d[i][0] ^ d[i][1] ^ d[i][2] ^ d[i][3];
  if (sum == kNever) *out = kNever;
}

}  // namespace llamaclust::cuda
