// Products with float weights: one fused multiply-add per weight, in the order of k, with one thread per output.
// Activations are float32 rows.
#include "float_teams.cuh"
#include "float_types.cuh"
#include "rows.cuh"

namespace llamaclust::cuda {
namespace {

// Starts copying `bytes` bytes, a multiple of 16.
DEVICE void copy_bytes(const uint8_t* from, int bytes, uint8_t* to) {
  for (int i = 16 * threadIdx.x; i < bytes; i += 16 * blockDim.x) copy_async_16(to + i, from + i);
}

#if LLAMACLUST_ARCH < 900
constexpr int kGemvColumns = 128, kGemvStages = 3, kGemvRowStride = kGemvColumns + 4;

template <class Type>
struct GemvStage {
  uint8_t weights[kGemvColumns * kColumnBytes<Type>];
  float x[8][kGemvRowStride];
};

// Up to eight rows, on GPUs without bulk copies. A block has a tile. All threads copy, two stages of 128 columns ahead,
// and sixteen threads for each row of activations compute. Limited by memory, or for short matrices by the latency of K
// dependent multiply-adds.
template <class Type>
DEVICE void gemv_floats(const Products& all) {
  SHARED(GemvStage<Type>, stages, [kGemvStages]);
  SHARED(int32_t, of_row, [8]);
  const Product p = product_of(all, 1, blockIdx.y);
  const Share share = share_of(p, blockIdx.x, 8);
  if (share.n <= 0) return;
  const int thread = threadIdx.x, row = thread % 16, token = thread / 16;
  if (thread < 8) of_row[thread] = activation_row(p, share, thread);
  __syncthreads();
  const uint8_t* tile = tile_of(p, share, p.block);
  const auto* x = reinterpret_cast<const float*>(p.activations);
  const auto copy = [&](int i) {
    const int first = i * kGemvColumns, count = p.cols - first < kGemvColumns ? p.cols - first : kGemvColumns;
    GemvStage<Type>& to = stages[i % kGemvStages];
    copy_bytes(tile + static_cast<size_t>(first) * kColumnBytes<Type>, count * kColumnBytes<Type>, to.weights);
    for (int n = thread; n < share.n * kGemvColumns; n += blockDim.x)
      if (n % kGemvColumns < count)
        copy_async_4(&to.x[n / kGemvColumns][n % kGemvColumns],
                     x + static_cast<size_t>(of_row[n / kGemvColumns]) * p.cols + first + n % kGemvColumns);
    copy_async_commit();
  };
  copy(0);
  copy(1);
  float total = 0.0f;
  for (int i = 0; i * kGemvColumns < p.cols; i++) {
    copy(i + 2);
    copy_async_wait<2>();
    __syncthreads();
    const GemvStage<Type>& stage = stages[i % kGemvStages];
    const int left = p.cols - i * kGemvColumns, count = left < kGemvColumns ? left : kGemvColumns;
    const auto add = [&](int k) {
      total = fma(Type::value(stage.weights + k * kColumnBytes<Type> + row * Type::kBytes), stage.x[token][k], total);
    };
    // Loads of the next elements overlap with additions, which depend on each other.
    if (token < share.n && count == kGemvColumns)
#pragma unroll 32
      for (int k = 0; k < kGemvColumns; k++) add(k);
    else if (token < share.n)
#pragma unroll 1
      for (int k = 0; k < count; k++) add(k);
    __syncthreads();
  }
  if (token >= share.n) return;
  store_result(result_of(p, share), p.bias_rows, out_row(p, share, token), 16 * p.block + row, total);
}
#endif

constexpr int kGemmColumns = 16, kGemmRows = 64, kGemmTiles = 4, kGemmRowStride = kGemmColumns + 4;

// With this padding, adjacent tiles start in different banks.
template <class Type>
struct GemmStage {
  uint8_t weights[kGemmTiles][(kGemmColumns + 1) * kColumnBytes<Type>];
  float x[kGemmRows][kGemmRowStride];
};

// Any number of rows. A block has 64 rows and four tiles, a thread 4 x 4 outputs. Per column a thread reads four
// weights, and per four columns four rows of activations. Limited by multiply-adds.
template <class Type>
DEVICE void gemm_floats(const Products& all) {
  SHARED(GemmStage<Type>, stages, [2]);
  SHARED(int32_t, of_row, [kGemmRows]);
  const Product p = product_of(all, kGemmTiles, blockIdx.y);
  const Share share = share_of(p, blockIdx.x, kGemmRows);
  if (share.n <= 0) return;
  const int thread = threadIdx.x, first_tile = kGemmTiles * p.block;
  if (thread < kGemmRows) of_row[thread] = activation_row(p, share, thread);
  __syncthreads();
  const auto* x = reinterpret_cast<const float*>(p.activations);
  const auto copy = [&](int first, GemmStage<Type>& to) {
    const int count = p.cols - first < kGemmColumns ? p.cols - first : kGemmColumns;
    for (int i = 0; i < kGemmTiles && first_tile + i < p.matrix().tile_count(); i++)
      copy_bytes(tile_of(p, share, first_tile + i) + static_cast<size_t>(first) * kColumnBytes<Type>,
                 count * kColumnBytes<Type>, to.weights[i]);
    for (int n = thread; n < kGemmRows * kGemmColumns; n += blockDim.x)
      if (n % kGemmColumns < count)
        copy_async_4(&to.x[n / kGemmColumns][n % kGemmColumns],
                     x + static_cast<size_t>(of_row[n / kGemmColumns]) * p.cols + first + n % kGemmColumns);
    copy_async_commit();
  };
  const int tile = thread % 16 / 4, row = thread % 4 * 4, token = thread / 16 * 4;
  float totals[4][4] = {};  // [token][row]
  copy(0, stages[0]);
  for (int first = 0, at = 0; first < p.cols; first += kGemmColumns, at ^= 1) {
    if (first + kGemmColumns < p.cols) {
      copy(first + kGemmColumns, stages[at ^ 1]);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const GemmStage<Type>& stage = stages[at];
    const int count = p.cols - first < kGemmColumns ? p.cols - first : kGemmColumns;
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
  const Matrix result = result_of(p, share);
  for (int i = 0; i < 4 && token + i < share.n; i++)
    for (int r = 0; r < 4; r++)
      store_result(result, p.bias_rows, out_row(p, share, token + i), 16 * (first_tile + tile) + row + r, totals[i][r]);
}

// out[row] = weights of tokens[row]. Grid: (width / 1024 rounded up, rows), blocks of 256 threads.
template <class Type>
DEVICE void embed(const int32_t* tokens, const uint8_t* tiles, int tile_bytes, int width, const int32_t* rows,
                  float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  const int index = tokens[row];
  const uint8_t* column = tiles + static_cast<size_t>(index / 16) * tile_bytes + index % 16 * Type::kBytes;
  out += static_cast<size_t>(row) * width;
  for (int i = 1024 * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) out[i] = Type::value(column + i * kColumnBytes<Type>);
}

}  // namespace

// Grid of gemv: (groups of eight rows, or items; tiles of all matrices), blocks of 128 threads, or of teams
// (float_teams.cuh). Grid of gemm: (groups of 64 rows, or items; tiles / 4 rounded up for each matrix), blocks of 256
// threads.
#define FLOAT_KERNELS(TYPE)                                                                                           \
  KERNEL_IN_BLOCKS(128, 4, gemv_##TYPE, MATMUL_PARAMETERS) { gemv_floats<TYPE>(MATMUL_ARGUMENTS); }                                \
  KERNEL(256, gemm_##TYPE, MATMUL_PARAMETERS) { gemm_floats<TYPE>(MATMUL_ARGUMENTS); }                                \
  EMBED_KERNEL(TYPE)
FLOAT_KERNELS(F32)
FLOAT_KERNELS(F16)
FLOAT_KERNELS(BF16)

}  // namespace llamaclust::cuda
