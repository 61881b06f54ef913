// Row by row steps that sum a row up.
#include "lines.cuh"
#include "math.cuh"

namespace llamaclust::cuda {

DEVICE float norm_scale(float squares, int n, float epsilon) {
  return div(1.0f, sqrt(add(div(squares, static_cast<float>(n)), epsilon)));
}

// out = x * scale * weight; out may be x. Grid: (1, rows), blocks of 256: one for a row.
KERNEL(256, rms_norm, const float* x, const float* __restrict__ weight, float epsilon, int32_t width,
       const int32_t* rows, float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, width), out += line(row, width);
  const float squares = sum_of_row(x, width, [](float sum, float v) { return fma(v, v, sum); });
  const float scale = norm_scale(squares, width, epsilon);
  for (int i = threadIdx.x; i < width; i += 256) out[i] = mul(mul(x[i], scale), weight[i]);
}

// The same for each of the `parts` of a row, of `width` each: a warp for a part. Grid: (parts / 8 rounded up, rows), blocks
// of 256.
KERNEL(256, rms_norm_parts, const float* x, const float* __restrict__ weight, float epsilon, int32_t parts,
       int32_t width, const int32_t* rows, float* out) {
  const int row = blockIdx.y, part = 8 * blockIdx.x + threadIdx.x / kWarp;
  if (row >= *rows || part >= parts) return;
  x += line(row * parts + part, width), out += line(row * parts + part, width);
  Lanes lanes;
  lanes.add_elements(width, [x](float sum, int i) { return fma(x[i], x[i], sum); });
  const float scale = norm_scale(lanes.total(), width, epsilon);
  for (int i = threadIdx.x % kWarp; i < width; i += kWarp) out[i] = mul(mul(x[i], scale), weight[i]);
}

// out = (x - mean) * scale * weight + bias, the last two one operation; out may be x. Grid: (1, rows), blocks of 256.
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

// out = y * 1 / (1 + exp(-x . weight)); out may be y. Grid: (1, rows), blocks of 256.
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
