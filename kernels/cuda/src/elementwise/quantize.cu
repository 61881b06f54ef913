// Quantizes rows of activations to eight bits: as they are, or combined from an inner layer's gate and up. There are
// *count * multiple rows. Grid: (rows / 8 rounded up, columns / 256 rounded up), blocks of 256 threads, in which a warp
// has 256 columns of a row. Limited by memory: five bytes per value, or nine.
#include "gated.cuh"
#include "quantize.cuh"

namespace llamaclust::cuda {
namespace {

// load(row, column, values) loads eight values of a row.
template <class Activations, class Load>
DEVICE void quantize_rows(int cols, const int32_t* count, int multiple, uint8_t* out, Load load) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const int rows = *count * multiple;
  const int row = kGroupRows * blockIdx.x + threadIdx.x / kWarp, column = 256 * blockIdx.y + 8 * (threadIdx.x % kWarp);
  if (row >= rows) return;
  Eight values = {};
  if (column < cols) load(row, column, values);
  quantize(values, row, blockIdx.y, cols, reinterpret_cast<Activations*>(out));
}

// Rows of gate and up start `stride` elements apart.
template <class Activations, class F>
DEVICE void quantize_gated(const float* gate, const float* up, int stride, int cols, const int32_t* count, int multiple,
                           uint8_t* out, F f) {
  quantize_rows<Activations>(cols, count, multiple, out, [=](int row, int column, Eight& values) {
    const size_t at = static_cast<size_t>(row) * stride + column;
    Eight by;
    load_fours(gate + at, values);
    load_fours(up + at, by);
    for (int i = 0; i < 8; i++) values[i] = f(values[i], by[i]);
  });
}

}  // namespace

#define QUANTIZE_KERNELS(cols_of_a_segment, Activations)                                                              \
  KERNEL(256, rows_##cols_of_a_segment, const float* x, int32_t cols, const int32_t* count, int32_t multiple,         \
         uint8_t* out) {                                                                                              \
    const auto load = [x, cols](int row, int column, Eight& values) {                                                 \
      load_fours(x + static_cast<size_t>(row) * cols + column, values);                                               \
    };                                                                                                                \
    quantize_rows<Activations>(cols, count, multiple, out, load);                                                   \
  }
#define QUANTIZE_GATED(name, cols_of_a_segment, Activations, value)                                                   \
  KERNEL(256, name##_##cols_of_a_segment, const float* gate, const float* up, int32_t stride, int32_t cols,           \
         const int32_t* count, int32_t multiple, uint8_t* out) {                                                      \
    const auto f = [](float a, float b) { return value; };                                                            \
    quantize_gated<Activations>(gate, up, stride, cols, count, multiple, out, f);                                   \
  }
QUANTIZE_KERNELS(32, Activations32)
QUANTIZE_KERNELS(256, Activations256)

#define GATED(name, value)                       \
  QUANTIZE_GATED(name, 32, Activations32, value) \
  QUANTIZE_GATED(name, 256, Activations256, value)
LLAMACLUST_GATED

}  // namespace llamaclust::cuda
