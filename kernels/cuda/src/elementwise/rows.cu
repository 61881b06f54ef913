// Row by row steps (model/program.py) element by element. Matrices are [rows, width], one row after the other. Grids, for
// blocks of 256 threads: (width / 1024 rounded up, rows of the bucket), of which *rows are there; out may be x.
#include "lines.cuh"
#include "math.cuh"

namespace llamaclust::cuda {

KERNEL(256, add_rows, const float* x, const float* y, int32_t width, const int32_t* rows, float* out) {
  each(x, y, width, rows, out, [](float a, float b) { return add(a, b); });
}

KERNEL(256, mul_rows, const float* x, const float* y, int32_t width, const int32_t* rows, float* out) {
  each(x, y, width, rows, out, [](float a, float b) { return mul(a, b); });
}

KERNEL(256, silu_mul, const float* gate, const float* up, int32_t width, const int32_t* rows, float* out) {
  each(gate, up, width, rows, out, [](float a, float b) { return mul(silu(a), b); });
}

KERNEL(256, scale_rows, const float* x, float factor, int32_t width, const int32_t* rows, float* out) {
  each(x, width, rows, out, [factor](float a) { return mul(a, factor); });
}

KERNEL(256, soft_cap_rows, const float* x, float cap, int32_t width, const int32_t* rows, float* out) {
  each(x, width, rows, out, [cap](float a) { return soft_cap(a, cap); });
}

#define ACTIVATION_ROWS(function)                                                                                   \
  KERNEL(256, function##_rows, const float* x, int32_t width, const int32_t* rows, float* out) {                    \
    each(x, width, rows, out, [](float a) { return function(a); });                                                 \
  }
LLAMACLUST_ACTIVATIONS(ACTIVATION_ROWS)

// out[row] = channels [start, start + width) of x[row], which has x_width. The grid is that of out, which is not x.
KERNEL(256, slice, const float* __restrict__ x, int32_t x_width, int32_t start, int32_t width, const int32_t* rows,
       float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) out[line(row, width) + i] = x[line(row, x_width) + start + i];
}

// out[row] = x[output_rows[row]], for *outputs rows. The grid is that of out, which is not x.
KERNEL(256, select_rows, const float* __restrict__ x, int32_t width, const int32_t* __restrict__ output_rows,
       const int32_t* outputs, float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row >= *outputs) return;
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) out[line(row, width) + i] = x[line(output_rows[row], width) + i];
}

}  // namespace llamaclust::cuda
