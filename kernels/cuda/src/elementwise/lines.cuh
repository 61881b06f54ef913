// Rows of matrices [rows, width]: elementwise operations, and sums in the order of the CPU's kernels.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

// Index of the first element of a row.
DEVICE size_t line(int row, int width) { return static_cast<size_t>(row) * static_cast<size_t>(width); }

inline constexpr int kPiece = 1024;  // Elements of a row for a block of 256 threads, four each.

// out = f(x...) for one piece of a row, of one or more matrices. Grid: (pieces of a row, rows). The pointers are not
// restricted, because x and out may be the same.
template <class F, class... Matrix>
DEVICE void each(int width, const int32_t* rows, float* out, F f, const Matrix*... x) {
  const int row = blockIdx.y, first = kPiece * blockIdx.x + 4 * threadIdx.x;
  if (row >= *rows) return;
  const size_t begin = line(row, width);
  if (width % 4 == 0) {
    if (first >= width) return;
    const auto four = [f](auto... a) -> float4 { return {f(a.x...), f(a.y...), f(a.z...), f(a.w...)}; };
    store_four(out + begin + first, four(load_four(x + begin + first)...));
  } else {
    for (int i = first; i < first + 4 && i < width; i++) out[begin + i] = f(x[begin + i]...);
  }
}

// A sum in 64 interleaved lanes (docs/internals/numerics.md). A thread of a warp has lanes `lane` and `lane` + 32.
struct Lanes {
  float low = 0.0f, high = 0.0f;

  // Adds elements i = lane, lane + 64, ... below `count` by sum = term(sum, i). Whole steps have no condition, so that
  // loads of several steps overlap.
  template <class Term>
  DEVICE void add_elements(int count, Term term) {
    const int n = count / 64 * 64;
#pragma unroll 8
    for (int i = threadIdx.x % kWarp; i < n; i += 64) {
      low = term(low, i);
      high = term(high, i + 32);
    }
    const int last = n + threadIdx.x % kWarp;
    if (last < count) low = term(low, last);
    if (last + 32 < count) high = term(high, last + 32);
  }

  // Adds halves: 32 + 32, 16 + 16, ... 1 + 1. Every lane gets the sum.
  DEVICE float total() const {
    float sum = add(low, high);
    for (int half = 16; half > 0; half /= 2) sum = add(sum, __shfl_down_sync(kAllLanes, sum, half));
    return __shfl_sync(kAllLanes, sum, 0);
  }
};

inline constexpr int kStaged = 4096;

// Shared memory of a block for elements of a row. All sums of a kernel use the same memory.
DEVICE float* staged_elements() {
  SHARED(float, staged, [kStaged]);
  return staged;
}

// Computes sum = term(sum, x[i]) over a row, called by all 256 threads of a block. They load x to shared memory; one
// warp sums.
template <class Term>
DEVICE float sum_of_row(const float* x, int n, Term term) {
  SHARED(float, result, [1]);
  float* staged = staged_elements();
  Lanes lanes;
  for (int from = 0; from < n; from += kStaged) {
    const int count = n - from < kStaged ? n - from : kStaged;
    __syncthreads();
    if (n % 4 == 0) {
      for (int i = 4 * threadIdx.x; i < count; i += 1024) store_four(staged + i, load_four(x + from + i));
    } else {
      for (int i = threadIdx.x; i < count; i += 256) staged[i] = x[from + i];
    }
    __syncthreads();
    if (threadIdx.x < kWarp) lanes.add_elements(count, [&](float sum, int i) { return term(sum, staged[i]); });
  }
  if (threadIdx.x < kWarp) result[0] = lanes.total();
  __syncthreads();
  return result[0];
}

}  // namespace llamaclust::cuda
