// Row by row steps (model/program.py) element by element. Matrices are [rows, width], one row after the other. Grids, for
// blocks of 256 threads: (width / 1024 rounded up, rows of the bucket), of which *rows are there; out may be x.
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

// Lines of experts: rows of gate and up begin `stride` elements apart; *rows * multiple of them are there. Grid: (lines,
// width / 1024 rounded up).
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

#define ACTIVATION_ROWS(function)                                                                                     \
  KERNEL(256, function##_rows, const float* x, int32_t width, const int32_t* rows, float* out) {                      \
    each(width, rows, out, [](float a) { return function(a); }, x);                                                   \
  }
LLAMACLUST_ACTIVATIONS(ACTIVATION_ROWS)

DEVICE void copy_line(const float* from, int width, float* to) {
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) to[i] = from[i];
}

// out[row] = channels [start, start + width) of x[row], which has x_width. The grid is that of out, which is not x.
KERNEL(256, slice, const float* __restrict__ x, int32_t x_width, int32_t start, int32_t width, const int32_t* rows,
       float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row < *rows) copy_line(x + line(row, x_width) + start, width, out + line(row, width));
}

// out[row] = x[output_rows[row]], for *outputs rows. The grid is that of out, which is not x.
KERNEL(256, select_rows, const float* __restrict__ x, int32_t width, const int32_t* __restrict__ output_rows,
       const int32_t* outputs, float* __restrict__ out) {
  const int row = blockIdx.y;
  if (row < *outputs) copy_line(x + line(output_rows[row], width), width, out + line(row, width));
}

}  // namespace llamaclust::cuda
