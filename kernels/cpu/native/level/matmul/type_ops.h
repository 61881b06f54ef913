// Products of a quant type, and its rows as float32, generated from its decoder; in one table per family of types.
#pragma once

#include "level/matmul/products.h"

namespace llamaclust::LLAMACLUST_LEVEL {

// The last two are null for a level that has only its own panels (panels_only.cpp).
struct TypeOps {
  QuantType type;
  TileLayout layout;
  int direct_tokens;  // Maximum number of tokens for `multiply_few`.
  void (*multiply_by_panels)(const Product& p, int tokens, int tile_begin, int tile_end, uint8_t* scratch);
  void (*multiply_few)(const Product& p, int tokens, int tile_begin, int tile_end);
  void (*dequantize)(const uint8_t* tile, int row, int cols, float* out);
};

struct TypeOpsTable {
  const TypeOps* types;
  size_t count;
};

extern const TypeOpsTable simple_types, k_types, grid_types;

#if defined(LLAMACLUST_PANELS_OVER)
constexpr bool kPanelsOnly = true;
#else
constexpr bool kPanelsOnly = false;
#endif

namespace {

INLINE const TypeOps& ops_of(QuantType type) {
  const TypeOpsTable* const tables[] = {&simple_types, &k_types, &grid_types};
  for (const TypeOpsTable* table : tables)
    for (size_t i = 0; i < table->count; i++)
      if (table->types[i].type == type) return table->types[i];
  __builtin_unreachable();
}

// Dequantizes one row of a tile. Every product is exact; in types with a min, adding it rounds once.

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
    if constexpr (kFloat<Type>)
      out[s] = lane(Type::column(tile + static_cast<size_t>(s) * Type::kLayout.body_bytes), row);
    else
      dequantize_segment<Type>(segment_of<Type>(tile, s, segments), row, out + s * width);
  }
}

}  // namespace

// The decoder for products. A type may use another one than for single weights, on the same tiles.
template <class Type>
struct InProducts {
  using Decoder = Type;
};
template <class Type>
  requires requires { typename Type::InProducts; }
struct InProducts<Type> : InProducts<typename Type::InProducts> {};
template <class Type>
  requires(kAnyByte && requires { Type::pairs; })
struct InProducts<Type> {
  using Decoder = InPlace<Type>;
};

namespace {

template <class Type>
constexpr TypeOps type_ops(QuantType type) {
  using Decoder = typename InProducts<Type>::Decoder;
  TypeOps ops{type, Type::kLayout, direct_tokens<Decoder>(), nullptr, nullptr, nullptr};
  if constexpr (!kFloat<Type>) ops.multiply_by_panels = multiply_by_panels<Decoder>;
  if constexpr (!kPanelsOnly) {
    ops.multiply_few = multiply_few<Decoder>;
    ops.dequantize = dequantize_tile_row<Type>;
  }
  return ops;
}

}  // namespace

// An entry for each row of a family's X macro, and a table of entries.
#define TYPE_OPS(name, ...) type_ops<name>(QuantType::name),
#define TYPE_OPS_TABLE(table, ...)                  \
  namespace {                                       \
  constexpr TypeOps kTypes[] = {__VA_ARGS__};       \
  }                                                 \
  const TypeOpsTable table{kTypes, sizeof kTypes / sizeof *kTypes};

}  // namespace llamaclust::LLAMACLUST_LEVEL
