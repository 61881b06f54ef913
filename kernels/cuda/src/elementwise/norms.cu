// Row by row steps that sum over a row.
#include "norm.cuh"
#include "quantize.cuh"

namespace llamaclust::cuda {

// out = x * scale * weight; out may be x. Grid: (1, rows), blocks of 256 threads, one per row.
KERNEL(256, rms_norm, const float* x, const float* __restrict__ weight, float epsilon, int32_t width,
       const int32_t* rows, float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, width), out += line(row, width);
  const float squares = sum_of_row(x, width, [](float sum, float v) { return fma(v, v, sum); });
  const float scale = norm_scale(squares, width, epsilon);
  for (int i = threadIdx.x; i < width; i += 256) out[i] = mul(mul(x[i], scale), weight[i]);
}

namespace {

// Copies x to shared memory; or x + y, if y is not null, which is also written to `sum`.
DEVICE void share_row(const float* x, const float* y, int width, float* sum, float* shared) {
  if (width % 4 == 0) {
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) {
      float4 a = load_four(x + i);
      if (y != nullptr) {
        const float4 b = load_four(y + i);
        a = {add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w)};
        store_four(sum + i, a);
      }
      store_four(shared + i, a);
    }
  } else {
    for (int i = threadIdx.x; i < width; i += blockDim.x) shared[i] = y == nullptr ? x[i] : sum[i] = add(x[i], y[i]);
  }
}

// Quantizes x * scale * weight of a row in shared memory.
template <class Activations>
DEVICE void quantize_normed(const float* shared, float scale, const float* weight, int row, int width, uint8_t* out) {
  const int pieces = (width + 255) / 256, warps = blockDim.x / kWarp;
  for (int piece = threadIdx.x / kWarp; piece < pieces; piece += warps) {
    const int column = 256 * piece + 8 * (threadIdx.x % kWarp);
    Eight values = {}, by = {};
    if (column < width) {
      load_fours(shared + column, values);
      load_fours(weight + column, by);
    }
    for (int i = 0; i < 8; i++) values[i] = mul(mul(values[i], scale), by[i]);
    quantize(values, row, piece, width, reinterpret_cast<Activations*>(out));
  }
}

}  // namespace

// All that happens between two products: sum = x + y, if y is not null; and the norm of that, as floats to `out` and
// quantized for products with segments of 32 and of 256 columns, each if its pointer is not null. Grid: (1, rows),
// blocks of whole warps. Shared memory: a row of floats.
KERNEL(1024, add_rms_norm, const float* x, const float* y, const float* __restrict__ weight, float epsilon,
       int32_t width, const int32_t* rows, float* sum, float* out, uint8_t* by_32, uint8_t* by_256) {
  SHARED(float, scale, [1]);
  let_next_kernel_begin();
  for (int i = 32 * threadIdx.x; i < width; i += 32 * blockDim.x) prefetch(weight + i);
  wait_for_earlier_kernels();
  const int row = blockIdx.y;
  if (row >= *rows) return;
  float* shared = reinterpret_cast<float*>(DYNAMIC_SHARED);
  const size_t begin = line(row, width);
  share_row(x + begin, y == nullptr ? y : y + begin, width, sum + begin, shared);
  __syncthreads();
  if (threadIdx.x < kWarp) {
    Lanes lanes;
    lanes.add_elements(width, [shared](float squares, int i) { return fma(shared[i], shared[i], squares); });
    scale[0] = norm_scale(lanes.total(), width, epsilon);
  }
  __syncthreads();
  if (out != nullptr)
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[begin + i] = mul(mul(shared[i], scale[0]), weight[i]);
  if (by_32 != nullptr) quantize_normed<Activations32>(shared, scale[0], weight, row, width, by_32);
  if (by_256 != nullptr) quantize_normed<Activations256>(shared, scale[0], weight, row, width, by_256);
}

// The norm of each of the `parts` of a row, of `width` channels each. A warp has a part. Grid: (parts / 8 rounded up,
// rows), blocks of 256 threads.
KERNEL(256, rms_norm_parts, const float* x, const float* __restrict__ weight, float epsilon, int32_t parts,
       int32_t width, const int32_t* rows, float* out) {
  const int row = blockIdx.y, part = 8 * blockIdx.x + threadIdx.x / kWarp;
  if (row >= *rows || part >= parts) return;
  const size_t begin = line(row * parts + part, width);
  norm_by_warp(x + begin, weight, epsilon, width, out + begin);
}

// The norm of parts with weights [parts, width], in tiles of 16 parts, column by column. Grid: (parts, rows), blocks of
// 256 threads.
KERNEL(256, rms_norm_groups, const float* x, const uint8_t* __restrict__ tiles, int32_t tile_bytes, float epsilon,
       int32_t width, const int32_t* rows, float* out) {
  const int row = blockIdx.y, part = blockIdx.x, parts = gridDim.x;
  if (row >= *rows) return;
  x += line(row * parts + part, width), out += line(row * parts + part, width);
  const float* weight = reinterpret_cast<const float*>(tiles + line(part / 16, tile_bytes)) + part % 16;
  const float squares = sum_of_row(x, width, [](float sum, float v) { return fma(v, v, sum); });
  const float scale = norm_scale(squares, width, epsilon);
  for (int i = threadIdx.x; i < width; i += 256) out[i] = mul(mul(x[i], scale), weight[16 * i]);
}

// out = (x - mean) * scale * weight + bias, with a final fma; out may be x. Grid: (1, rows), blocks of 256 threads.
KERNEL(256, layer_norm, const float* x, const float* __restrict__ weight, const float* __restrict__ bias,
       float epsilon, int32_t width, const int32_t* rows, float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, width), out += line(row, width);
  const float sum = sum_of_row(x, width, [](float total, float v) { return add(total, v); });
  const float mean = div(sum, static_cast<float>(width));
  const auto square = [mean](float total, float v) { return fma(sub(v, mean), sub(v, mean), total); };
  const float scale = norm_scale(sum_of_row(x, width, square), width, epsilon);
  for (int i = threadIdx.x; i < width; i += 256) out[i] = fma(mul(sub(x[i], mean), scale), weight[i], bias[i]);
}

// out = y * 1 / (1 + exp(-x . weight)); out may be y. Grid: (1, rows), blocks of 256 threads.
KERNEL(256, sigmoid_gate, const float* __restrict__ x, const float* __restrict__ weight, const float* y,
       int32_t x_width, int32_t width, const int32_t* rows, float* out) {
  SHARED(float, factor, [1]);
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, x_width), y += line(row, width), out += line(row, width);
  if (threadIdx.x < kWarp) {
    Lanes lanes;
    lanes.add_elements(x_width, [x, weight](float sum, int i) { return fma(x[i], weight[i], sum); });
    factor[0] = div(1.0f, add(1.0f, exp(-lanes.total())));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += 256) out[i] = mul(y[i], factor[0]);
}

}  // namespace llamaclust::cuda
