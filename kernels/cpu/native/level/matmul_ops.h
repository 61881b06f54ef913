// Matrix products with tiled weights (the part of a level that is compiled for each instruction set), and the layout of
// quantized activations.
#pragma once

#include "level/quant_types.h"

namespace llamaclust {

// A weight matrix [rows, cols] in tiles of 16 rows, with one SIMD lane per row. Rows beyond the end have zero weights.
struct Matrix {
  QuantType type;
  int32_t rows;
  int32_t cols;
  // Bytes from one tile (16 rows, all columns) to the next; a multiple of 64.
  size_t tile_bytes;
  const uint8_t* tiles;  // Aligned to 64 bytes.
  int32_t tile_count() const { return (rows + kTileRows - 1) / kTileRows; }
};

// Activations of one segment. q = x * (127 / maximum), to nearest, ties to even; scale = maximum / 127. A maximum
// magnitude below 2^-118 counts as 0. A segment with an infinity or a NaN has a scale of NaN and quants of 0.
struct Q8_32 {
  int8_t q[32];
  float scale;
  float scaled_sum;  // scale * sum, rounded once.
  int32_t sum;       // Sum of q.
};
struct Q8_256 {
  int8_t q[256];
  int32_t sums[16];  // Sums of q over 16 values each.
  // A sum of 32 values is 128 * high + low, with low in [-64, 63].
  int8_t sums_high[8];
  int8_t sums_low[8];
  int8_t sums_16_high[16];  // The same for sums of 16 values.
  int8_t sums_16_low[16];
  float scale;
  int32_t padding[3];
};
// Scratch memory for many tokens: a panel of kPanelTiles decoded tiles, followed by the sums of up to kPanelMostTokens
// tokens between two stretches of k, and of kPanelMorePlaces more tokens, whose results are discarded.
constexpr int kPanelTiles = 4, kPanelMostTokens = 512, kPanelMorePlaces = 8;
constexpr size_t kPanelTileBytes = 48 << 10;
constexpr size_t kMatmulScratchBytes =
    kPanelTiles * (kPanelTileBytes + (kPanelMostTokens + kPanelMorePlaces) * kTileRows * sizeof(float));

static_assert(sizeof(Q8_32) == 44 && alignof(Q8_32) == 4);
static_assert(sizeof(Q8_256) == 384 && alignof(Q8_256) == 4);

// Lines that the tokens of a product read and write; null if they are consecutive.
struct TokenLines {
  const int32_t* activations = nullptr;
  const int32_t* out = nullptr;
};

// The distance at which products of one or two tokens, which memory limits, prefetch weights. Far: 20 KiB ahead into
// L2. Near: 6 KiB ahead into L1, bypassing L2. Products of more tokens always use Far.
enum class Prefetch : uint8_t { Far, Near };
constexpr int kPrefetchedTokens = 2;

// Bytes of one token's activations, a multiple of 64.
size_t activation_bytes(ActivationFormat format, int cols);

// Number of floats that have the size of one token's activations without their sums.
int packed_floats(ActivationFormat format, int cols);

struct MatmulOps {
  // Quantizes x[cols] to one row of activation_bytes(format, cols) bytes.
  void (*quantize)(ActivationFormat format, const float* x, int cols, void* out);
  // pack quantizes x[cols] to packed_floats(format, cols) floats, which hold q and scale of each segment. unpack
  // converts these to a row as `quantize` writes it, with all sums.
  void (*pack)(ActivationFormat format, const float* x, int cols, float* out);
  void (*unpack)(ActivationFormat format, const float* packed, int cols, void* out);
  // out[line of token t * out_stride + row] = dot(weights of row, activations of token t), for the rows of tiles
  // [tile_begin, tile_end) and tokens [0, tokens). Rows beyond the end of the matrix are not written. bias may be null.
  // `scratch` has kMatmulScratchBytes bytes that only the calling thread uses.
  void (*matmul)(const Matrix& weights, const uint8_t* activations, int tokens, const TokenLines& lines, float* out,
                 size_t out_stride, const float* bias, int tile_begin, int tile_end, uint8_t* scratch,
                 Prefetch prefetch);
  // out[cols] = the row's weights as float32.
  void (*dequantize_row)(const Matrix& weights, int row, float* out);
};

}  // namespace llamaclust
