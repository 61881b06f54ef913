// The rows of a product, for all kinds of products: all rows, or with experts the lines of each expert.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {
namespace {

// Arguments of every product. Weights are up to three matrices [out_rows, cols] of one type in tiles, each with a
// result; missing ones have no rows. Without `items`, row i of *count rows of activations gives row i of out. With
// `items`, block (x, _) computes items[x] = {expert, first, n}: n lines from lines[first] on. Line l takes row l /
// divisor of the activations and gives row l of out. An expert's matrix starts matrix_bytes after the previous one. Its
// bias is a row of a matrix in which `bias_rows` rows are interleaved column by column: 16 in a tile of float32, 1 if
// rows are consecutive.
#define MATMUL_PARAMETERS                                                                                            \
  const uint8_t *tiles, int32_t out_rows, const float *bias, float *out, const uint8_t *tiles_2, int32_t out_rows_2,  \
      const float *bias_2, float *out_2, const uint8_t *tiles_3, int32_t out_rows_3, const float *bias_3,             \
      float *out_3, int32_t tile_bytes, int32_t matrix_bytes, int32_t cols, const uint8_t *activations,               \
      const int32_t *count, const int32_t *items, const int32_t *item_count, const int32_t *lines, int32_t divisor,       \
      int32_t bias_rows
#define MATMUL_ARGUMENTS                                                                                             \
  {{tiles, out_rows, bias, out}, {tiles_2, out_rows_2, bias_2, out_2}, {tiles_3, out_rows_3, bias_3, out_3},          \
   tile_bytes, matrix_bytes, cols, activations, count, items, item_count, lines, divisor, bias_rows}

// Rows of a matrix as float32: out[row] = weights of tokens[row].
#define EMBED_KERNEL(TYPE)                                                                                            \
  KERNEL(256, embed_##TYPE, const int32_t* tokens, const uint8_t* tiles, int32_t tile_bytes, int32_t width,           \
         const int32_t* rows, float* out) {                                                                           \
    embed<TYPE>(tokens, tiles, tile_bytes, width, rows, out);                                                         \
  }

struct Matrix {
  const uint8_t* tiles;
  int out_rows;
  const float* bias;
  float* out;

  DEVICE int tile_count() const { return (out_rows + 15) / 16; }
};

struct Products {
  Matrix first, second, third;
  int tile_bytes, matrix_bytes, cols;
  const uint8_t* activations;
  const int32_t *count, *items, *item_count, *lines;
  int divisor, bias_rows;

  DEVICE int tile_count() const { return first.tile_count() + second.tile_count() + third.tile_count(); }
};

// The matrix of a block, and the index of the block among those of the same matrix.
struct Product : Products {
  int which, block;

  // Selected again at each use, so that it takes no registers in between.
  DEVICE Matrix matrix() const { return which == 0 ? first : which == 1 ? second : third; }
};

// Each block has `each` tiles. Blocks of the first matrix come first.
DEVICE Product product_of(const Products& p, int each, int place) {
  const int first = (p.first.tile_count() + each - 1) / each, block = place - first;
  if (block < 0) return {p, 0, place};
  const int second = (p.second.tile_count() + each - 1) / each;
  return block < second ? Product{p, 1, block} : Product{p, 2, block - second};
}

// The rows of one block, n of them; none if n <= 0.
struct Share {
  int expert, first, n;
};
DEVICE Share share_of(const Products& p, int place, int most) {
  if (p.items == nullptr) {
    const int first = most * place, left = *p.count - first;
    return {0, first, left < most ? left : most};
  }
  if (place >= *p.item_count) return {0, 0, 0};
  const int32_t* item = p.items + 3 * place;
  return {item[0], item[1], item[2]};
}
DEVICE int groups_of(const Share& share) { return (share.n + 7) / 8; }
DEVICE int out_row(const Products& p, const Share& share, int i) {
  return p.items == nullptr ? share.first + i : p.lines[share.first + i];
}
// Rows beyond the end repeat the last one, and their results are discarded.
DEVICE int activation_row(const Products& p, const Share& share, int i) {
  const int row = out_row(p, share, i < share.n ? i : share.n - 1);
  return p.items == nullptr ? row : row / p.divisor;
}
DEVICE const uint8_t* tile_of(const Product& p, const Share& share, int tile) {
  return p.matrix().tiles + static_cast<size_t>(share.expert) * p.matrix_bytes + static_cast<size_t>(tile) * p.tile_bytes;
}

// Returns the matrix of a block, with the bias of its expert.
DEVICE Matrix result_of(const Product& p, const Share& share) {
  Matrix matrix = p.matrix();
  const int column = share.expert % p.bias_rows;
  if (matrix.bias != nullptr) matrix.bias += static_cast<size_t>(share.expert - column) * matrix.out_rows + column;
  return matrix;
}

DEVICE void store_result(const Matrix& matrix, int bias_rows, int line, int row, float x) {
  if (row >= matrix.out_rows) return;
  if (matrix.bias != nullptr) x = add(x, matrix.bias[row * bias_rows]);
  matrix.out[static_cast<size_t>(line) * matrix.out_rows + row] = canonical(x);
}

}  // namespace
}  // namespace llamaclust::cuda
