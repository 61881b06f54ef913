// The matrix operations of a level: which code serves which quant type.
#include "matmul_ops.h"

#include "matmul_dequantize.h"
#include "matmul_float.h"
#include "matmul_quantize.h"
#include "matmul_quantized.h"
#include "quants/q4_0.h"
#include "quants/q4_1.h"
#include "quants/q4_k.h"
#include "quants/q6_k.h"
#include "quants/q8_0.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Call {
  const Matrix& weights;
  const uint8_t* activations;
  int tokens;
  Output output;
  int tile_begin, tile_end;
  uint8_t* scratch;
};

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Type>
void quantized(const Call& call) {
  const int segments = call.weights.cols / Type::kLayout.segment_cols;
  const Product product{call.weights.tiles, call.weights.tile_bytes, call.activations,
                        whole_lines(static_cast<size_t>(segments) * sizeof(Activation<Type>)), segments, call.output};
  multiply_quantized<Type>(product, call.tokens, call.tile_begin, call.tile_end, call.scratch);
}

template <class Type>
void floats(const Call& call) {
  const FloatProduct product{call.weights.tiles, call.weights.tile_bytes,
                             reinterpret_cast<const float*>(call.activations),
                             whole_lines(static_cast<size_t>(call.weights.cols) * sizeof(float)) / sizeof(float),
                             call.weights.cols, call.output};
  multiply_all_floats<Type>(product, call.tokens, call.tile_begin, call.tile_end);
}

void matmul(const Matrix& weights, const uint8_t* activations, int tokens, float* out, size_t out_stride,
            const float* bias, int tile_begin, int tile_end, uint8_t* scratch) {
  const Output output{out, out_stride, bias, weights.rows};
  const Call call{weights, activations, tokens, output, tile_begin, tile_end, scratch};
  switch (weights.type) {
    case QuantType::F32: return floats<F32>(call);
    case QuantType::F16: return floats<F16>(call);
    case QuantType::BF16: return floats<BF16>(call);
    case QuantType::Q4_0: return quantized<Q4_0>(call);
    case QuantType::Q4_1: return quantized<Q4_1>(call);
    case QuantType::Q8_0: return quantized<Q8_0>(call);
    case QuantType::Q4_K: return quantized<Q4_K>(call);
    case QuantType::Q6_K: return quantized<Q6_K>(call);
  }
}

void dequantize_row(const Matrix& weights, int row, float* out) {
  const uint8_t* tile = weights.tiles + static_cast<size_t>(row / kTileRows) * weights.tile_bytes;
  const int r = row % kTileRows;
  switch (weights.type) {
    case QuantType::F32: return float_row<F32>(tile, r, weights.cols, out);
    case QuantType::F16: return float_row<F16>(tile, r, weights.cols, out);
    case QuantType::BF16: return float_row<BF16>(tile, r, weights.cols, out);
    case QuantType::Q4_0: return quantized_row<Q4_0>(tile, r, weights.cols, out);
    case QuantType::Q4_1: return quantized_row<Q4_1>(tile, r, weights.cols, out);
    case QuantType::Q8_0: return quantized_row<Q8_0>(tile, r, weights.cols, out);
    case QuantType::Q4_K: return quantized_row<Q4_K>(tile, r, weights.cols, out);
    case QuantType::Q6_K: return quantized_row<Q6_K>(tile, r, weights.cols, out);
  }
}

}  // namespace

extern const MatmulOps matmul_ops;
const MatmulOps matmul_ops{quantize, matmul, dequantize_row};

}  // namespace llamaclust::LLAMACLUST_LEVEL
