// The matrix operations of a level that has its own loop for many tokens, and shares all others with the level
// LLAMACLUST_PANELS_OVER.
#include "level/matmul/type_ops.h"

namespace llamaclust::LLAMACLUST_PANELS_OVER {
extern const MatmulOps matmul_ops;
}

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr const MatmulOps& others = LLAMACLUST_PANELS_OVER::matmul_ops;

void quantize(ActivationFormat format, const float* x, int cols, void* out) { others.quantize(format, x, cols, out); }

void pack(ActivationFormat format, const float* x, int cols, float* out) { others.pack(format, x, cols, out); }

void unpack(ActivationFormat format, const float* packed, int cols, void* out) {
  others.unpack(format, packed, cols, out);
}

void matmul(const Matrix& weights, const uint8_t* activations, int tokens, const TokenLines& lines, float* out,
            size_t out_stride, const float* bias, int tile_begin, int tile_end, uint8_t* scratch,
            Prefetch prefetch) {
  const TypeOps& ops = ops_of(weights.type);
  if (tokens > ops.direct_tokens) {
    const Product product = product_of(ops.layout, weights, activations, lines, out, out_stride, bias, prefetch);
    return ops.multiply_by_panels(product, tokens, tile_begin, tile_end, scratch);
  }
  others.matmul(weights, activations, tokens, lines, out, out_stride, bias, tile_begin, tile_end, scratch, prefetch);
}

void dequantize_row(const Matrix& weights, int row, float* out) { others.dequantize_row(weights, row, out); }

}  // namespace

extern const MatmulOps matmul_ops;
const MatmulOps matmul_ops{quantize, pack, unpack, matmul, dequantize_row};

}  // namespace llamaclust::LLAMACLUST_LEVEL
