// Row by row steps that scale channels by a weight, or combine the equal parts of a row.
#include "lines.cuh"
#include "math.cuh"

namespace llamaclust::cuda {

// out = x * weight; out may be x. Grid: (width / 1024 rounded up, rows of the bucket), blocks of 256 threads.
KERNEL(256, scale_channels, const float* x, const float* __restrict__ weight, int32_t width, const int32_t* rows,
       float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  const size_t begin = line(row, width);
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) out[begin + i] = mul(x[begin + i], weight[i]);
}

// out_i = y_i + the sum over j of (coefficients[i][j] + offset) * x_j, for parts of `width` channels; parts before
// `first` are those of y. Without coefficients, the factors are 1. out may be y. Grid: as above, for the width of out.
KERNEL(256, mix, const float* __restrict__ x, const float* y, const float* __restrict__ coefficients, float offset,
       int32_t width, int32_t first, int32_t x_parts, int32_t parts, const int32_t* rows, float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, width * x_parts), y += line(row, width * parts), out += line(row, width * parts);
  if (coefficients != nullptr) coefficients += line(row, parts * x_parts);
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++) {
    if (i >= width * parts) return;
    const int part = i / width, channel = i % width;
    float total = y[i];
    for (int j = 0; part >= first && j < x_parts; j++) {
      const float factor = coefficients == nullptr ? 1.0f : add(coefficients[part * x_parts + j], offset);
      total = fma(x[j * width + channel], factor, total);
    }
    out[i] = total;
  }
}

// out[row] = the sum of `count` parts of x[row], in order, times `share`. out is not x. Grid: as above, for the width
// of out.
KERNEL(256, mean_parts, const float* __restrict__ x, int32_t count, float share, int32_t width, const int32_t* rows,
       float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, count * width), out += line(row, width);
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++) {
    if (i >= width) return;
    float total = x[i];
    for (int part = 1; part < count; part++) total = add(total, x[part * width + i]);
    out[i] = mul(total, share);
  }
}

// Multiplies each of the `parts` of x, which have the width of y, by the root mean square of y divided by its own; its
// own mean square is at least epsilon. out may be x. A warp has a part. Grid: (parts / 8 rounded up, rows), blocks of
// 256 threads.
KERNEL(256, match_magnitude, const float* x, const float* __restrict__ y, float epsilon, int32_t parts, int32_t width,
       const int32_t* rows, float* out) {
  const int row = blockIdx.y, part = 8 * blockIdx.x + threadIdx.x / kWarp;
  if (row >= *rows || part >= parts) return;
  x += line(row * parts + part, width), y += line(row, width), out += line(row * parts + part, width);
  Lanes own, wanted;
  own.add_elements(width, [x](float sum, int i) { return fma(x[i], x[i], sum); });
  wanted.add_elements(width, [y](float sum, int i) { return fma(y[i], y[i], sum); });
  const float mean = div(own.total(), static_cast<float>(width)), least = epsilon > mean ? epsilon : mean;
  const float factor = div(sqrt(div(wanted.total(), static_cast<float>(width))), sqrt(least));
  for (int i = threadIdx.x % kWarp; i < width; i += kWarp) out[i] = mul(x[i], factor);
}

// out = max((x - mean) - factor * standard deviation, 0), NaN for NaN; out may be x. Grid: (1, rows), blocks of 256
// threads.
KERNEL(256, gaussian_top_k, const float* x, float factor, int32_t width, const int32_t* rows, float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, width), out += line(row, width);
  const float count = static_cast<float>(width);
  const float mean = div(sum_of_row(x, width, [](float total, float v) { return add(total, v); }), count);
  const auto square = [mean](float total, float v) { return fma(sub(v, mean), sub(v, mean), total); };
  const float cutoff = mul(factor, sqrt(div(sum_of_row(x, width, square), count)));
  for (int i = threadIdx.x; i < width; i += 256) {
    const float left = sub(sub(x[i], mean), cutoff);
    out[i] = 0.0f > left ? 0.0f : left;
  }
}

}  // namespace llamaclust::cuda
