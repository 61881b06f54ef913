// Products of a quant type and its rows as float32, from its decoder; in tables by family of types.
#pragma once

#include "level/matmul/products.h"

namespace llamaclust::LLAMACLUST_LEVEL {

// Of a level that has nothing but panels of its own (panels_only.cpp), the last two are null.
struct TypeOps {
  QuantType type;
  TileLayout layout;
  int direct_tokens;  // up to how many `multiply_few` serves
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
    if constexpr (kFloat<Type>)
      out[s] = lane(Type::column(tile + static_cast<size_t>(s) * Type::kLayout.body_bytes), row);
    else
      dequantize_segment<Type>(segment_of<Type>(tile, s, segments), row, out + s * width);
  }
}

}  // namespace

// What products take, where that is another decoder of the same tiles than the one that tells single weights.
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

// A row of a family's X macro as an entry, and a table of entries.
#define TYPE_OPS(name, ...) type_ops<name>(QuantType::name),
#define TYPE_OPS_TABLE(table, ...)                  \
  namespace {                                       \
  constexpr TypeOps kTypes[] = {__VA_ARGS__};       \
  }                                                 \
  const TypeOpsTable table{kTypes, sizeof kTypes / sizeof *kTypes};

}  // namespace llamaclust::LLAMACLUST_LEVEL
