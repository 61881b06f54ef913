// Kernels that ask a device what it does: the shim is checked against what CUDA and PTX promise, and for noticing mistakes.
#include "mma.cuh"

namespace llamaclust::cuda {

// A grid of two blocks of 64. out[i] = the sum over the other lanes' numbers, by each kind of shuffle.
KERNEL(64, shuffles, const int32_t* x, int32_t* out) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  const int32_t value = x[i];
  out[4 * i] = __shfl_sync(kAllLanes, value, threadIdx.x + 1);
  out[4 * i + 1] = __shfl_xor_sync(kAllLanes, value, 5);
  out[4 * i + 2] = __shfl_down_sync(kAllLanes, value, 3, 8);
  out[4 * i + 3] = __shfl_up_sync(kAllLanes, value, 2);
}

// One block of 128: each thread reads what another one wrote, in static and in dynamic shared memory.
KERNEL(128, shared, const float* x, float* out) {
  SHARED(float, first, [2][64]);
  float* second = reinterpret_cast<float*>(DYNAMIC_SHARED);
  const int i = threadIdx.x;
  first[i / 64][i % 64] = x[i];
  second[i] = 2 * x[i];
  __syncthreads();
  out[i] = first[(127 - i) / 64][(127 - i) % 64] + second[(i + 1) % 128];
}

// One warp: d[16][8] of 32 columns (k = 32), signed or unsigned, or of 16 signed ones.
KERNEL(32, multiply, const int32_t* a, const int32_t* b, int32_t k, int32_t is_unsigned, int32_t* d) {
  const int lane = threadIdx.x;
  int32_t sums[4];
  for (int i = 0; i < 4; i++) sums[i] = d[4 * lane + i];
  if (k == 32 && is_unsigned) {
    const uint32_t rows[4] = {uint32_t(a[4 * lane]), uint32_t(a[4 * lane + 1]), uint32_t(a[4 * lane + 2]), uint32_t(a[4 * lane + 3])};
    const int32_t columns[2] = {b[2 * lane], b[2 * lane + 1]};
    multiply_k32(sums, rows, columns);
  } else if (k == 32) {
    const int32_t rows[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
    const int32_t columns[2] = {b[2 * lane], b[2 * lane + 1]};
    multiply_k32(sums, rows, columns);
  } else {
    const int32_t rows[2] = {a[2 * lane], a[2 * lane + 1]};
    const int32_t columns[1] = {b[lane]};
    multiply_k16(sums, rows, columns);
  }
  for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
}

// Blocks of 64. out = the dot products of int16 and the lower bytes, and the upper ones.
KERNEL(64, bytes, const int32_t* a, const int32_t* b, int32_t n, int32_t* out) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  if (i >= n) return;
  out[i] = dp2a_low(a[i], b[i], i);
  out[n + i] = dp2a_high(a[i], b[i], i);
}

// Blocks of 64. Every half as a float; every float as a half.
KERNEL(64, halves, const uint16_t* half, float* out) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = half_to_float(half[i]);
}
KERNEL(64, rounded, const float* x, uint16_t* out) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = float_to_half(x[i]);
}

// One block of 32. Three groups of copies; as many are waited for as `done` says.
KERNEL(32, copies, const float* x, int32_t done, float* out) {
  SHARED(float, there, [3][128]);
  for (int part = 0; part < 3; part++) {
    copy_async_16(&there[part][4 * threadIdx.x], x + 128 * part + 4 * threadIdx.x);
    copy_async_commit();
  }
  if (done == 3) copy_async_wait<0>();
  if (done == 2) copy_async_wait<1>();
  __syncthreads();
  for (int i = threadIdx.x; i < 384; i += 32) out[i] = there[i / 128][(i % 128 + 5) % 128];
}

// One block of 32. Of `n` parts of 64 numbers, each in two bulk copies, as many are under way as there is memory for; `early`:
// one is read before it is waited for; `mixed`: most of a part is copied by all lanes.
KERNEL(32, bulk_copies, const float* x, int32_t n, int32_t early, int32_t mixed, float* out) {
  const int lane = threadIdx.x, stages = dynamic_shared_bytes() / 264;
  float* parts = reinterpret_cast<float*>(DYNAMIC_SHARED);
  const SharedAddress to = shared_address(parts), arrivals = shared_address(parts + 64 * stages);
  const auto request = [&](int i) {
    if (i >= n) return;
    const SharedAddress arrival = arrivals + 8 * (i % stages), part = to + 256 * (i % stages);
    if (lane == 0) arrival_announce(arrival, mixed ? 16 : 256);
    if (lane == 0) copy_bulk(part, x + 64 * i, 16, arrival);
    if (lane == 0 && !mixed) copy_bulk(part + 16, x + 64 * i + 4, 240, arrival);
    if (mixed && lane < 15) copy_async_16(part + 16 * (1 + lane), x + 64 * i + 4 * (1 + lane));
    if (mixed) copy_async_arrive(arrival);
  };
  for (int i = 0; i < stages && lane == 0; i++) arrival_init(arrivals + 8 * i, mixed ? 32 : 0);
  publish_shared();
  __syncwarp();
  for (int i = 0; i < stages; i++) request(i);
  for (int i = 0; i < n; i++) {
    if (i != early) arrival_wait(arrivals + 8 * (i % stages), i / stages % 2);
    for (int k = lane; k < 64; k += 32) out[64 * i + k] = parts[64 * (i % stages) + (k + 5) % 64];
    if (i == early) arrival_wait(arrivals + 8 * (i % stages), i / stages % 2);
    __syncwarp();
    request(i + stages);
  }
}

// Mistakes, `kind` says which. One block of 64.
KERNEL(64, mistakes, int32_t kind, const float* x, float* out) {
  SHARED(float, lanes, [64]);
  const int i = threadIdx.x;
  lanes[i] = x[i];
  if (kind == 0 && i < 3) return;
  if (kind == 1 && i < 32)
    __syncthreads();
  else
    __syncthreads();
  if (kind == 2 && i % 2 == 0) __shfl_sync(kAllLanes, i, 0);
  if (kind == 3) out[i] = lanes[i + (i == 63)];
  if (kind == 4) out[i + (i == 63)] = lanes[i];
  if (kind == 5) out[0] = load_four(x + i).x;
  if (kind == 6) out[i] = x[i - 100000 * (i == 63)];
  if (kind == 7) __shfl_sync(1u << i % 32, i, 5);
  if (kind == 8) out[-1] = 1;
  if (kind == 9) prefetch(x - 100000 * (i == 63));
  if (kind == 10 && i < 32) barrier_wait<1, 64>();
  if (kind == 11) i < 32 ? barrier_arrive<1, 64>() : barrier_wait<1, 96>();
  if (kind == 12) barrier_arrive<16, 64>();
  if (kind == 13 && i < 32) barrier_arrive<2, 64>();
  if (kind == 14) barrier_wait<3, 40>();
  if (kind == 15 && i % 2 == 0)
    barrier_wait<4, 64>();
  else if (kind == 15)
    barrier_wait<4, 64>();
  if (kind < 16 || kind > 23) return;
  SHARED(float, there, [64]);
  SHARED(uint64_t, arrivals, [2]);
  const SharedAddress to = shared_address(there), arrival = shared_address(arrivals);
  if (i == 0 && kind != 16) arrival_init(arrival + (kind == 17 ? 4 : 0));
  __syncthreads();
  if (i == 0) arrival_announce(arrival, 16);
  if (i == 0) copy_bulk(to, kind == 18 ? x + 1 : x, kind == 19 ? 32 : 16, arrival);
  if (i == 0 && kind == 20) arrival_announce(arrival, 16);
  if (kind == 23) copy_async_arrive(arrival);
  if (kind != 21) arrival_wait(arrival, kind == 22);
  if (kind == 22) arrival_wait(arrival, 0), arrival_wait(arrival, 1);
}

// One block of three warps, which take `turns`: each takes what it finds from a number of its own.
KERNEL(96, turns, const int32_t* x, int32_t turns, int32_t* out) {
  SHARED(int32_t, passed, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int turn = warp; turn < turns; turn += 3) {
    if (turn > 0) warp == 0 ? barrier_wait<1, 64>() : warp == 1 ? barrier_wait<2, 64>() : barrier_wait<15, 64>();
    passed[lane] = x[turn] - (turn > 0 ? passed[lane] : 0);
    if (turn + 1 < turns)
      warp == 0 ? barrier_arrive<2, 64>() : warp == 1 ? barrier_arrive<15, 64>() : barrier_arrive<1, 64>();
  }
  __syncthreads();
  if (warp == 0) out[lane] = passed[lane];
}

// One block of 64: how many are the last, in so many rounds.
KERNEL(64, last_ones, int32_t rounds, int32_t* out) {
  SHARED(uint32_t, counter, [1]);
  if (threadIdx.x == 0) counter[0] = 0;
  __syncthreads();
  for (int i = 0; i < rounds; i++)
    if (is_last(shared_address(counter), 64)) atomicAdd(out, 1);
}

// Two blocks of 64. Who wants another one's number gets it only if that one was there before: in the block, or in all.
KERNEL(64, races, int32_t in_block, float* all, float* out) {
  SHARED(float, lanes, [64]);
  const int i = threadIdx.x;
  lanes[i] = static_cast<float>(i);
  if (i == 0) all[blockIdx.x] = 1;
  out[64 * blockIdx.x + i] = in_block ? lanes[63 - i] : all[1 - blockIdx.x];
}

// Blocks of 32: counts what is odd.
KERNEL(32, count, const int32_t* x, int32_t* odd, int32_t* largest) {
  const int32_t value = x[blockIdx.x * 32 + threadIdx.x];
  if (value & 1) atomicAdd(odd, 1);
  atomicMax(largest, value);
}

}  // namespace llamaclust::cuda
