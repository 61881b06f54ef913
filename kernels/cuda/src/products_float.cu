// Products with float weights: one fused multiply-add a weight, in k order, one thread an output. Activations are
// float32 rows.
#include "float_weights.cuh"

namespace llamaclust::cuda {
namespace {

constexpr int kFewColumns = 128, kFewStages = 3, kFewRowStride = kFewColumns + 4;

template <class Type>
struct FewStage {
  uint8_t weights[kFewColumns * kColumnBytes<Type>];
  float x[8][kFewRowStride];
};

// Up to eight rows: a block has a tile. Bound by memory, or for short matrices by the latency of K dependent
// multiply-adds: all threads copy, two stages of 128 columns ahead, sixteen a row of activations compute.
template <class Type>
DEVICE void multiply_few_floats(const Products& all) {
  SHARED(FewStage<Type>, stages, [kFewStages]);
  SHARED(int32_t, of_row, [8]);
  const Product p = product_of(all, 1);
  const Share share = share_of(p, blockIdx.x, 8);
  if (share.n <= 0) return;
  const int thread = threadIdx.x, row = thread % 16, token = thread / 16;
  if (thread < 8) of_row[thread] = activation_row(p, share, thread);
  __syncthreads();
  const uint8_t* tile = tile_of(p, share, p.block);
  const auto* x = reinterpret_cast<const float*>(p.activations);
  const auto copy = [&](int i) {
    const int first = i * kFewColumns, count = p.cols - first < kFewColumns ? p.cols - first : kFewColumns;
    FewStage<Type>& to = stages[i % kFewStages];
    copy_bytes(tile + static_cast<size_t>(first) * kColumnBytes<Type>, count * kColumnBytes<Type>, to.weights);
    for (int n = thread; n < share.n * kFewColumns; n += blockDim.x)
      if (n % kFewColumns < count)
        copy_async_4(&to.x[n / kFewColumns][n % kFewColumns],
                     x + static_cast<size_t>(of_row[n / kFewColumns]) * p.cols + first + n % kFewColumns);
    copy_async_commit();
  };
  copy(0);
  copy(1);
  float total = 0.0f;
  for (int i = 0; i * kFewColumns < p.cols; i++) {
    copy(i + 2);
    copy_async_wait<2>();
    __syncthreads();
    const FewStage<Type>& stage = stages[i % kFewStages];
    const int left = p.cols - i * kFewColumns, count = left < kFewColumns ? left : kFewColumns;
    if (token < share.n)
      for (int k = 0; k < count; k++)
        total = fma(Type::value(stage.weights + k * kColumnBytes<Type> + row * Type::kBytes), stage.x[token][k], total);
    __syncthreads();
  }
  if (token < share.n) store_result(p.matrix(), out_row(p, share, token), 16 * p.block + row, total);
}

constexpr int kManyColumns = 16, kManyRows = 64, kManyTiles = 4, kManyRowStride = kManyColumns + 4;

// Tiles begin on other banks than their neighbours.
template <class Type>
struct ManyStage {
  uint8_t weights[kManyTiles][(kManyColumns + 1) * kColumnBytes<Type>];
  float x[kManyRows][kManyRowStride];
};

// Any number of rows: a block has 64 by four tiles, a thread 4 x 4 outputs: per column it reads four weights and, all
// four columns, four rows of activations. Bound by multiply-adds.
template <class Type>
DEVICE void multiply_many_floats(const Products& all) {
  SHARED(ManyStage<Type>, stages, [2]);
  SHARED(int32_t, of_row, [kManyRows]);
  const Product p = product_of(all, kManyTiles);
  const Share share = share_of(p, blockIdx.x, kManyRows);
  if (share.n <= 0) return;
  const int thread = threadIdx.x, first_tile = kManyTiles * p.block;
  if (thread < kManyRows) of_row[thread] = activation_row(p, share, thread);
  __syncthreads();
  const auto* x = reinterpret_cast<const float*>(p.activations);
  const auto copy = [&](int first, ManyStage<Type>& to) {
    const int count = p.cols - first < kManyColumns ? p.cols - first : kManyColumns;
    for (int i = 0; i < kManyTiles && first_tile + i < p.matrix().tile_count(); i++)
      copy_bytes(tile_of(p, share, first_tile + i) + static_cast<size_t>(first) * kColumnBytes<Type>,
                 count * kColumnBytes<Type>, to.weights[i]);
    for (int n = thread; n < kManyRows * kManyColumns; n += blockDim.x)
      if (n % kManyColumns < count)
        copy_async_4(&to.x[n / kManyColumns][n % kManyColumns],
                     x + static_cast<size_t>(of_row[n / kManyColumns]) * p.cols + first + n % kManyColumns);
    copy_async_commit();
  };
  const int tile = thread % 16 / 4, row = thread % 4 * 4, token = thread / 16 * 4;
  float totals[4][4] = {};  // [token][row]
  copy(0, stages[0]);
  for (int first = 0, at = 0; first < p.cols; first += kManyColumns, at ^= 1) {
    if (first + kManyColumns < p.cols) {
      copy(first + kManyColumns, stages[at ^ 1]);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const ManyStage<Type>& stage = stages[at];
    const int count = p.cols - first < kManyColumns ? p.cols - first : kManyColumns;
    for (int k = 0; k < count; k++) {
      const float4 w = Type::four(stage.weights[tile] + k * kColumnBytes<Type> + row * Type::kBytes);
      for (int i = 0; i < 4; i++) {
        const float activation = stage.x[token + i][k];
        totals[i][0] = fma(w.x, activation, totals[i][0]);
        totals[i][1] = fma(w.y, activation, totals[i][1]);
        totals[i][2] = fma(w.z, activation, totals[i][2]);
        totals[i][3] = fma(w.w, activation, totals[i][3]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < 4; r++)
      if (token + i < share.n)
        store_result(p.matrix(), out_row(p, share, token + i), 16 * (first_tile + tile) + row + r, totals[i][r]);
}

}  // namespace

// Grids: (groups of eight rows or items, tiles of all matrices), blocks of 128; (groups of 64 or items, for each matrix
// tiles / 4 rounded up), blocks of 256.
#define FLOAT_KERNELS(TYPE)                                                                                           \
  KERNEL(128, few_##TYPE, PRODUCT_PARAMETERS) { multiply_few_floats<TYPE>(PRODUCT_ARGUMENTS); }                       \
  KERNEL(256, many_##TYPE, PRODUCT_PARAMETERS) { multiply_many_floats<TYPE>(PRODUCT_ARGUMENTS); }
FLOAT_KERNELS(F32)
FLOAT_KERNELS(F16)
FLOAT_KERNELS(BF16)

}  // namespace llamaclust::cuda
