// Matrix products of tiled weights, the part of a level that is compiled per instruction set, and how quantized
// activations lie in memory.
#pragma once

#include "level/quant_types.h"

namespace llamaclust {

// A weight matrix [rows, cols] in tiles of 16 rows, one SIMD lane a row; rows past the end hold zero weights.
struct Matrix {
  QuantType type;
  int32_t rows;
  int32_t cols;
  size_t tile_bytes;     // from one tile (16 rows, all columns) to the next; a multiple of 64
  const uint8_t* tiles;  // aligned to 64
  int32_t tile_count() const { return (rows + kTileRows - 1) / kTileRows; }
};

// Activations of one segment. q = x * (127 / maximum) to nearest, ties to even; scale = maximum / 127; a maximum below
// 2^-118 counts as zero. A segment with an infinity or a NaN has a NaN scale and zeros.
struct Q8_32 {
  int8_t q[32];
  float scale;
  float scaled_sum;  // scale * sum, one rounding
  int32_t sum;       // of q
};
struct Q8_256 {
  int8_t q[256];
  int32_t sums[16];     // of q, per 16
  int8_t sums_high[8];  // sums per 32 are 128 * high + low, with low in [-64, 63]
  int8_t sums_low[8];
  int8_t sums_16_high[16];  // sums per 16 likewise
  int8_t sums_16_low[16];
  float scale;
  int32_t padding[3];
};
// Weights unpacked for many tokens: a panel of so many tiles, for so many tokens at most, whose sums wait for the next
// stretch of k behind it, with room for some more tokens that are computed and thrown away.
constexpr int kPanelTiles = 4, kPanelMostTokens = 512, kPanelMorePlaces = 8;
constexpr size_t kPanelTileBytes = 48 << 10;
constexpr size_t kMatmulScratchBytes =
    kPanelTiles * (kPanelTileBytes + (kPanelMostTokens + kPanelMorePlaces) * kTileRows * sizeof(float));

static_assert(sizeof(Q8_32) == 44 && alignof(Q8_32) == 4);
static_assert(sizeof(Q8_256) == 384 && alignof(Q8_256) == 4);

// Which lines the tokens of a product read and write, where they do not lie one after the other; null where they do.
struct TokenLines {
  const int32_t* activations = nullptr;
  const int32_t* out = nullptr;
};

// How products of one or two tokens, which memory bounds, prefetch weights: Far is 20 KiB ahead into L2, Near 6 KiB ahead
// into L1, past L2. Products of more tokens are always Far.
enum class Prefetch : uint8_t { Far, Near };
constexpr int kPrefetchedTokens = 2;

// Bytes of one token's activations, a multiple of 64.
size_t activation_bytes(ActivationFormat format, int cols);

// How many floats take the room of one token's activations without their sums.
int packed_floats(ActivationFormat format, int cols);

struct MatmulOps {
  // Quantizes x[cols] into one activation row of activation_bytes(format, cols).
  void (*quantize)(ActivationFormat format, const float* x, int cols, void* out);
  // The same as packed_floats(format, cols) floats, which are q and scale of each segment; and back, with all sums.
  void (*pack)(ActivationFormat format, const float* x, int cols, float* out);
  void (*unpack)(ActivationFormat format, const float* packed, int cols, void* out);
  // out[line of t * out_stride + row] = dot(weights of row, activations of token t) for the rows of tiles [tile_begin,
  // tile_end) and tokens [0, tokens); rows past the matrix's end are not written. bias may be null. `scratch` holds
  // kMatmulScratchBytes private to the calling thread.
  void (*matmul)(const Matrix& weights, const uint8_t* activations, int tokens, const TokenLines& lines, float* out,
                 size_t out_stride, const float* bias, int tile_begin, int tile_end, uint8_t* scratch,
                 Prefetch prefetch);
  // out[cols] = the row's weights as float32.
  void (*dequantize_row)(const Matrix& weights, int row, float* out);
};

}  // namespace llamaclust
