// The matrix operations of a level: a decoder a quant type, the loops around it the same for all.
#include "level/matmul_ops.h"

#include "level/matmul/quantize_activations.h"
#include "level/matmul/dequantize.h"
#include "level/matmul/float.h"
#include "level/matmul/quantized.h"
#include "level/quants/grid.h"
#include "level/quants/k.h"
#include "level/quants/simple.h"
#include "level/quants/ternary.h"
#include "pack/pack.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Call {
  const Matrix& weights;
  const uint8_t* activations;
  int tokens;
  const int32_t* activation_lines;
  Output output;
  int tile_begin, tile_end;
  uint8_t* scratch;
};

template <class Type>
void multiply(const Call& call) {
  const Matrix& w = call.weights;
  const size_t activation_stride = activation_bytes(Type::kLayout.activation, w.cols);
  if constexpr (Type::kLayout.activation == ActivationFormat::F32) {
    const auto* x = reinterpret_cast<const float*>(call.activations);
    const FloatProduct product{
        w.tiles, w.tile_bytes, x, activation_stride / sizeof(float), call.activation_lines, w.cols, call.output};
    multiply_floats<Type>(product, call.tokens, call.tile_begin, call.tile_end);
  } else {
    const int segments = w.cols / Type::kLayout.segment_cols;
    const Product product{w.tiles,  w.tile_bytes, call.activations, activation_stride, call.activation_lines,
                          segments, call.output};
    multiply_quantized<Type>(product, call.tokens, call.tile_begin, call.tile_end, call.scratch);
  }
}

struct TypeOps {
  QuantType type;
  void (*multiply)(const Call& call);
  void (*dequantize)(const uint8_t* tile, int row, int cols, float* out);
};

#define OPS(name, ...) {QuantType::name, multiply<name>, dequantize_tile_row<name>},
constexpr TypeOps kTypes[] = {LLAMACLUST_QUANT_TYPES(OPS)};
#undef OPS

const TypeOps& ops_of(QuantType type) {
  const TypeOps* ops = kTypes;
  while (ops->type != type) ops++;
  return *ops;
}

void matmul(const Matrix& weights, const uint8_t* activations, int tokens, const TokenLines& lines, float* out,
            size_t out_stride, const float* bias, int tile_begin, int tile_end, uint8_t* scratch) {
  const Output output{out, out_stride, lines.out, bias, weights.rows};
  ops_of(weights.type).multiply(
      {weights, activations, tokens, lines.activations, output, tile_begin, tile_end, scratch});
}

void dequantize_row(const Matrix& weights, int row, float* out) {
  const uint8_t* tile = weights.tiles + static_cast<size_t>(row / kTileRows) * weights.tile_bytes;
  ops_of(weights.type).dequantize(tile, row % kTileRows, weights.cols, out);
}

}  // namespace

extern const MatmulOps matmul_ops;
const MatmulOps matmul_ops{quantize, matmul, dequantize_row};

}  // namespace llamaclust::LLAMACLUST_LEVEL
