// One table of the quant types that products support, and the layout of their tiles, which is the same for every
// feature level and for GPUs. A row of the table defines a type's number, layout, packer and decoder, and its entry in
// the list that Python gets.
//
// A tile holds 16 rows. Its columns are divided into segments of 32 or 256 columns, within which sums are exact
// integers. A segment consists of a body (quants and sub-block scales, in whole cache lines) and a tail (float scales).
// If a tail is smaller than a cache line, the bodies of 2 or 4 segments precede their tails, so that all loads are
// aligned. Only the last group of a tile may have fewer segments.
//
// In a body, a k-group is 64 bytes: four columns of sixteen rows, byte 4 * row + column. Tiles of float types are
// columns of sixteen values. level/quants/ defines the bits of each type's body and tail.
#pragma once

#include <cstddef>
#include <cstdint>

// X(name, number in ggml, columns of a segment, bytes of a row's segment in a model file, bytes of a tile's tail, bytes
// of a tile's segment beyond sixteen times those in the file, packer in pack/). The decoders of a group are in a header
// of level/quants/.
#define LLAMACLUST_FLOAT_TYPES(X) \
  X(F32, 0, 1, 4, 0, 0, 32_bits)  \
  X(F16, 1, 1, 2, 0, 0, 16_bits)  \
  X(BF16, 30, 1, 2, 0, 0, 16_bits)
#define LLAMACLUST_SIMPLE_TYPES(X)  \
  X(Q4_0, 2, 32, 18, 32, 0, q4_0)   \
  X(Q4_1, 3, 32, 20, 64, 0, q4_1)   \
  X(Q5_0, 6, 32, 22, 32, 0, q5_0)   \
  X(Q5_1, 7, 32, 24, 64, 0, q5_1)   \
  X(Q8_0, 8, 32, 34, 32, 0, q8_0)   \
  X(IQ4_NL, 20, 32, 18, 32, 0, q4_0) \
  X(MXFP4, 39, 32, 17, 16, 0, mxfp4)
#define LLAMACLUST_K_TYPES(X)        \
  X(Q2_K, 10, 256, 84, 64, 0, q2_k)   \
  X(Q3_K, 11, 256, 110, 32, 0, q3_k)  \
  X(Q4_K, 12, 256, 144, 64, 0, q4_k)  \
  X(Q5_K, 13, 256, 176, 64, 0, q5_k)  \
  X(Q6_K, 14, 256, 210, 32, 0, q6_k)  \
  X(IQ4_XS, 23, 256, 136, 32, 32, iq4_xs)
#define LLAMACLUST_TERNARY_TYPES(X)    \
  X(TQ2_0, 35, 256, 66, 32, 0, tq2_0)  \
  X(TQ1_0, 34, 256, 54, 32, 64, tq1_0)
#define LLAMACLUST_GRID_TYPES(X)             \
  X(IQ2_XXS, 16, 256, 66, 32, 64, iq2_xxs)   \
  X(IQ2_XS, 17, 256, 74, 32, 64, iq2_xs)     \
  X(IQ2_S, 22, 256, 82, 32, 256, iq2_s)      \
  X(IQ3_XXS, 18, 256, 98, 32, 64, iq3_xxs)   \
  X(IQ3_S, 21, 256, 110, 32, 384, iq3_s)     \
  X(IQ1_S, 19, 256, 50, 32, 192, iq1_s)      \
  X(IQ1_M, 29, 256, 56, 0, 192, iq1_m)
#define LLAMACLUST_QUANTIZED_TYPES(X) \
  LLAMACLUST_SIMPLE_TYPES(X) LLAMACLUST_K_TYPES(X) LLAMACLUST_TERNARY_TYPES(X) LLAMACLUST_GRID_TYPES(X)
#define LLAMACLUST_QUANT_TYPES(X) LLAMACLUST_FLOAT_TYPES(X) LLAMACLUST_QUANTIZED_TYPES(X)

namespace llamaclust {

#define NUMBER(name, number, ...) name = number,
enum class QuantType : int32_t { LLAMACLUST_QUANT_TYPES(NUMBER) };
#undef NUMBER

// Storage of a row of activations for a product: float32, or int8 with one float scale per 32 or per 256 values.
enum class ActivationFormat : int32_t { F32, Q8_32, Q8_256 };

inline constexpr int kTileRows = 16;

struct TileLayout {
  int segment_cols;
  int file_bytes;  // Bytes of a row's segment in a model file.
  int body_bytes;  // Bytes of a tile's segment.
  int tail_bytes;
  ActivationFormat activation;
  constexpr __attribute__((always_inline)) int group_segments() const {
    return tail_bytes == 0 || tail_bytes >= 64 ? 1 : 64 / tail_bytes;
  }
};

// All members are 0 for a type that is not in the table.
constexpr TileLayout tile_layout(QuantType type) {
  switch (type) {
#define LAYOUT(name, number, cols, file, tail, extra, packer)          \
  case QuantType::name:                                                \
    return {cols, file, kTileRows * file + extra - tail, tail,         \
            cols == 1    ? ActivationFormat::F32                       \
            : cols == 32 ? ActivationFormat::Q8_32                     \
                         : ActivationFormat::Q8_256};
    LLAMACLUST_QUANT_TYPES(LAYOUT)
#undef LAYOUT
  }
  return {};
}

// To speed up decoding, a tile's segment may be a tenth larger than in the file, and a quarter larger for types below
// four bits per weight. Bodies are whole cache lines.
constexpr bool is_near_file_size(const TileLayout& t) {
  const int allowed_percent = 8 * t.file_bytes < 4 * t.segment_cols ? 125 : 110;
  return 100 * (t.body_bytes + t.tail_bytes) <= allowed_percent * kTileRows * t.file_bytes;
}
#define CHECK(name, ...)                                         \
  static_assert(is_near_file_size(tile_layout(QuantType::name))); \
  static_assert(tile_layout(QuantType::name).segment_cols == 1 || tile_layout(QuantType::name).body_bytes % 64 == 0);
LLAMACLUST_QUANT_TYPES(CHECK)
#undef CHECK

}  // namespace llamaclust
