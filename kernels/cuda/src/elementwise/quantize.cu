// Rows of activations in eight bits, as they are or of an inner layer's gate and up. Grid: (columns / 256 rounded up,
// rows / 8 rounded up), blocks of 256: a warp has 256 columns of a row. *count * multiple rows are there. Bound by
// memory: five bytes a value, or nine.
#include "math.cuh"
#include "quantize.cuh"

namespace llamaclust::cuda {
namespace {

// `load` brings eight values from an element on.
template <class Activations, class Load>
DEVICE void quantize_rows(int cols, int rows, uint8_t* out, Load load) {
  const int row = kGroupRows * blockIdx.y + threadIdx.x / kWarp, column = 256 * blockIdx.x + 8 * (threadIdx.x % kWarp);
  if (row >= rows) return;
  Eight values = {};
  if (column < cols) load(static_cast<size_t>(row) * cols + column, values);
  quantize(values, row, blockIdx.x, cols, reinterpret_cast<Activations*>(out));
}

template <class Activations, class F>
DEVICE void quantize_gated(const float* gate, const float* up, int cols, int rows, uint8_t* out, F f) {
  quantize_rows<Activations>(cols, rows, out, [=](size_t at, Eight& values) {
    Eight by;
    load_fours(gate + at, values);
    load_fours(up + at, by);
    for (int i = 0; i < 8; i++) values[i] = mul(f(values[i]), by[i]);
  });
}

}  // namespace

#define QUANTIZE_KERNELS(cols_of_a_segment, Activations)                                                              \
  KERNEL(256, rows_##cols_of_a_segment, const float* x, int32_t cols, const int32_t* count, int32_t multiple,         \
         uint8_t* out) {                                                                                              \
    const auto load = [x](size_t at, Eight& values) { load_fours(x + at, values); };                                  \
    quantize_rows<Activations>(cols, *count * multiple, out, load);                                                   \
  }
#define QUANTIZE_GATED(function, cols_of_a_segment, Activations)                                                      \
  KERNEL(256, function##_mul_##cols_of_a_segment, const float* gate, const float* up, int32_t cols,                   \
         const int32_t* count, int32_t multiple, uint8_t* out) {                                                      \
    quantize_gated<Activations>(gate, up, cols, *count * multiple, out, [](float x) { return function(x); });         \
  }
QUANTIZE_KERNELS(32, Activations32)
QUANTIZE_KERNELS(256, Activations256)

#define QUANTIZE_GATED_32(function) QUANTIZE_GATED(function, 32, Activations32)
#define QUANTIZE_GATED_256(function) QUANTIZE_GATED(function, 256, Activations256)
LLAMACLUST_ACTIVATIONS(QUANTIZE_GATED_32)
LLAMACLUST_ACTIVATIONS(QUANTIZE_GATED_256)

}  // namespace llamaclust::cuda
