// The matrix operations of a level: a decoder a quant type, the loops around it the same for all.
#include "level/matmul_ops.h"

#include "level/matmul/activations.h"
#include "level/matmul/dequantize.h"
#include "level/matmul/float.h"
#include "level/matmul/quantized.h"
#include "level/quants/iq1_m.h"
#include "level/quants/iq1_s.h"
#include "level/quants/iq2_s.h"
#include "level/quants/iq2_xs.h"
#include "level/quants/iq2_xxs.h"
#include "level/quants/iq3_s.h"
#include "level/quants/iq3_xxs.h"
#include "level/quants/iq4_nl.h"
#include "level/quants/iq4_xs.h"
#include "level/quants/mxfp4.h"
#include "level/quants/q2_k.h"
#include "level/quants/q3_k.h"
#include "level/quants/q4_0.h"
#include "level/quants/q4_1.h"
#include "level/quants/q4_k.h"
#include "level/quants/q5_0.h"
#include "level/quants/q5_1.h"
#include "level/quants/q5_k.h"
#include "level/quants/q6_k.h"
#include "level/quants/q8_0.h"
#include "level/quants/tq1_0.h"
#include "level/quants/tq2_0.h"
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

template <class Type>
constexpr TypeOps kOps{Type::kType, multiply<Type>, dequantize_tile_row<Type>};

constexpr TypeOps kTypes[] = {
    kOps<F32>,
    kOps<F16>,
    kOps<BF16>,
    kOps<Q8_0>,
    kOps<Q4_0>,
    kOps<Q4_1>,
    kOps<Q5_0>,
    kOps<Q5_1>,
    kOps<Q2_K>,
    kOps<Q3_K>,
    kOps<Q4_K>,
    kOps<Q5_K>,
    kOps<Q6_K>,
    kOps<IQ4_NL>,
    kOps<IQ4_XS>,
    kOps<MXFP4>,
    kOps<TQ2_0>,
    kOps<TQ1_0>,
    kOps<IQ2_XXS>,
    kOps<IQ2_XS>,
    kOps<IQ2_S>,
    kOps<IQ3_XXS>,
    kOps<IQ3_S>,
    kOps<IQ1_S>,
    kOps<IQ1_M>,
};

// Of a type that pack.h supports.
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
