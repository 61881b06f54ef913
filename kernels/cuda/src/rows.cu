// Row by row steps (model/program.py). Matrices are [rows, width], rows one after the other. Launches are for the rows of a
// bucket; *rows of them are there.
#include "base.cuh"

namespace llamaclust::cuda {

// out = x + y. Grid: (width / 1024 rounded up, rows), blocks of 256.
KERNEL(256, add_rows, const float* x, const float* y, int32_t width, const int32_t* rows, float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  for (int i = blockIdx.x * 1024 + threadIdx.x; i < width && i < blockIdx.x * 1024 + 1024; i += 256)
    out[row * width + i] = add(x[row * width + i], y[row * width + i]);
}

}  // namespace llamaclust::cuda
