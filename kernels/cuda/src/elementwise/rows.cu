// Row by row steps (model/steps/rows.py), element by element. Matrices are [rows, width], row after row. Grid: (width /
// 1024 rounded up, rows of the bucket), blocks of 256 threads; *rows rows exist. out may be x.
#include "gated.cuh"
#include "lines.cuh"

namespace llamaclust::cuda {

#define ROWS_OF_TWO(name, value)                                                                                      \
  KERNEL(256, name##_rows, const float* x, const float* y, int32_t width, const int32_t* rows, float* out) {          \
    each(width, rows, out, [](float a, float b) { return value; }, x, y);                                             \
  }
ROWS_OF_TWO(add, add(a, b))
ROWS_OF_TWO(mul, mul(a, b))
ROWS_OF_TWO(silu_mul, mul(silu(a), b))

#define ROWS_BY(name, value)                                                                                          \
  KERNEL(256, name##_rows, const float* x, float by, int32_t width, const int32_t* rows, float* out) {                \
    each(width, rows, out, [by](float a) { return value; }, x);                                                       \
  }
ROWS_BY(scale, mul(a, by))
ROWS_BY(soft_cap, soft_cap(a, by))

// Lines of experts. Rows of gate and up start `stride` elements apart; there are *rows * multiple. Grid: (lines, width
// / 1024 rounded up).
#define GATED(name, value)                                                                                            \
  KERNEL(256, name##_lines, const float* gate, const float* up, int32_t stride, int32_t width, const int32_t* rows,   \
         int32_t multiple, float* out) {                                                                              \
    const int row = blockIdx.x, first = kPiece * blockIdx.y + 4 * threadIdx.x;                                        \
    if (row >= *rows * multiple) return;                                                                              \
    for (int i = first; i < first + 4 && i < width; i++) {                                                            \
      const float a = gate[line(row, stride) + i], b = up[line(row, stride) + i];                                     \
      out[line(row, width) + i] = value;                                                                              \
    }                                                                                                                 \
  }
LLAMACLUST_GATED

// out = x * *by.
KERNEL(256, scale_by_weight_rows, const float* x, const float* by, int32_t width, const int32_t* rows, float* out) {
  each(width, rows, out, [factor = *by](float a) { return mul(a, factor); }, x);
}

// out = min(max(x, *low), *high), NaN for NaN.
KERNEL(256, clamp_rows, const float* x, const float* low, const float* high, int32_t width, const int32_t* rows,
       float* out) {
  each(width, rows, out, [from = *low, to = *high](float a) { return min(to, max(from, a)); }, x);
}

// out[row] = x[row] * factors[(positions[row] + offset) / length].
KERNEL(256, scale_by_position_rows, const float* x, const float* factors, const int32_t* positions, int32_t offset,
       int32_t length, int32_t width, const int32_t* rows, float* out) {
  if (static_cast<int>(blockIdx.y) >= *rows) return;
  const uint32_t position = static_cast<uint32_t>(positions[blockIdx.y]) + static_cast<uint32_t>(offset);
  const float factor = factors[position / static_cast<uint32_t>(length)];
  each(width, rows, out, [factor](float a) { return mul(a, factor); }, x);
}

#define ACTIVATION_ROWS(function)                                                                                     \
  KERNEL(256, function##_rows, const float* x, int32_t width, const int32_t* rows, float* out) {                      \
    each(width, rows, out, [](float a) { return function(a); }, x);                                                   \
  }
LLAMACLUST_ACTIVATIONS(ACTIVATION_ROWS)

DEVICE void copy_line(const float* from, int width, float* to) {
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) to[i] = from[i];
}

// out[row] = channels [start, start + width) of each of the `parts` of x[row], which have x_width channels. out is not
// x. Grid: as above, for the width of out.
KERNEL(256, slice, const float* __restrict__ x, int32_t x_width, int32_t start, int32_t width, int32_t parts,
       const int32_t* rows, float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  x += line(row, x_width * parts) + start, out += line(row, width * parts);
  if (parts == 1) return copy_line(x, width, out);
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width * parts) out[i] = x[i / width * x_width + i % width];
}

// out[row] = for each of the `parts`, x_width channels of x[row] and then y_width channels of y[row]. out is a third
// matrix. Grid: as above, for the width of out.
KERNEL(256, join, const float* __restrict__ x, const float* __restrict__ y, int32_t x_width, int32_t y_width,
       int32_t parts, const int32_t* rows, float* __restrict__ out) {
  const int row = blockIdx.y, width = x_width + y_width;
  if (row >= *rows) return;
  x += line(row, x_width * parts), y += line(row, y_width * parts), out += line(row, width * parts);
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++) {
    const int part = i / width, channel = i % width;
    if (i < width * parts)
      out[i] = channel < x_width ? x[part * x_width + channel] : y[part * y_width + channel - x_width];
  }
}

// out[row] = x[output_rows[row]], for *outputs rows. out is not x. Grid: as above, for the width of out.
KERNEL(256, select_rows, const float* __restrict__ x, int32_t width, const int32_t* __restrict__ output_rows,
       const int32_t* outputs, float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row < *outputs) copy_line(x + line(output_rows[row], width), width, out + line(row, width));
}

}  // namespace llamaclust::cuda
