// The matrix operations of a level: a decoder a quant type, the loops around it the same for all.
#include "level/matmul_ops.h"

#include "level/matmul/quantize_activations.h"
#include "level/matmul/float.h"
#include "level/matmul/quantized.h"
#include "level/quants/grid.h"
#include "level/quants/k.h"
#include "level/quants/simple.h"
#include "pack/pack.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// One row of a tile as float32: every product is exact; types with a min round once, when it comes in.

DECODE float lane(F32x16 x, int row) {
  float v[16];
  store(v, x);
  return v[row];
}

// Scale and min of sub-block j of one row.
struct RowScale {
  float scale, min;
};

template <class Type>
RowScale row_scale(const TileSegment<Type>& w, int j, int row) {
  const float scale = lane(w.scale(), row);
  float min = 0.0f;
  if constexpr (Type::kHasMin) min = lane(w.min(), row);
  if constexpr (!kSubScaled<Type>) return {scale, min};
  if constexpr (kSubScaled<Type>) {
    const F32x16 sub_scale = to_float(scale_lanes(w.sub_scale(j)));
    if constexpr (Type::kHasMin) {
      alignas(64) uint8_t mins[64];
      store_bytes(mins, w.mins(j / 4));
      min *= -static_cast<float>(mins[4 * row + j % 4]);
    }
    return {scale * lane(sub_scale, row), min};
  }
}

template <class Type>
void dequantize_segment(const TileSegment<Type>& w, int row, float* out) {
  for (int j = 0; j < Type::kSubBlocks; j++) {
    const RowScale scale = row_scale<Type>(w, j, row);
    UNROLL for (int g = 0; g < kGroups<Type>; g++, out += 4) {
      alignas(64) uint8_t q[64];
      store_bytes(q, w.group(j, g));
      for (int i = 0; i < 4; i++) out[i] = scale.scale * static_cast<float>(q[4 * row + i] - Type::kOffset) + scale.min;
    }
  }
}

template <class Type>
void dequantize_tile_row(const uint8_t* tile, int row, int cols, float* out) {
  constexpr int width = Type::kLayout.segment_cols;
  const int segments = cols / width;
  for (int s = 0; s < segments; s++) {
    if constexpr (Type::kLayout.activation == ActivationFormat::F32)
      out[s] = lane(Type::column(tile + static_cast<size_t>(s) * Type::kLayout.body_bytes), row);
    else
      dequantize_segment<Type>(segment_of<Type>(tile, s, segments), row, out + s * width);
  }
}

template <class Type>
void multiply(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch) {
  if constexpr (Type::kLayout.activation == ActivationFormat::F32)
    multiply_floats<Type>(p, tokens, tile_begin, tile_end);
  else
    multiply_quantized<Type>(p, tokens, tile_begin, tile_end, scratch);
}

struct TypeOps {
  QuantType type;
  TileLayout layout;
  void (*multiply)(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch);
  void (*dequantize)(const uint8_t* tile, int row, int cols, float* out);
};

#define OPS(name, ...) {QuantType::name, name::kLayout, multiply<name>, dequantize_tile_row<name>},
constexpr TypeOps kTypes[] = {LLAMACLUST_QUANT_TYPES(OPS)};
#undef OPS

const TypeOps& ops_of(QuantType type) {
  const TypeOps* ops = kTypes;
  while (ops->type != type) ops++;
  return *ops;
}

void matmul(const Matrix& weights, const uint8_t* activations, int tokens, const TokenLines& lines, float* out,
            size_t out_stride, const float* bias, int tile_begin, int tile_end, uint8_t* scratch) {
  const TypeOps& ops = ops_of(weights.type);
  const Product product{weights.tiles,
                        weights.tile_bytes,
                        activations,
                        activation_bytes(ops.layout.activation, weights.cols),
                        lines.activations,
                        weights.cols / ops.layout.segment_cols,
                        {out, out_stride, lines.out, bias, weights.rows}};
  ops.multiply(product, tokens, tile_begin, tile_end, scratch);
}

void dequantize_row(const Matrix& weights, int row, float* out) {
  const uint8_t* tile = weights.tiles + static_cast<size_t>(row / kTileRows) * weights.tile_bytes;
  ops_of(weights.type).dequantize(tile, row % kTileRows, weights.cols, out);
}

}  // namespace

extern const MatmulOps matmul_ops;
const MatmulOps matmul_ops{quantize, matmul, dequantize_row};

}  // namespace llamaclust::LLAMACLUST_LEVEL
