// Which rows a product is of, for all products: all that there are, or with experts the lines that each has.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {
namespace {

// Arguments of every product. Weights are [out_rows, cols] in tiles. Without `items`, row i of *count of the
// activations gives row i of out. With them, block (x, _) serves items[x] = {expert, first, n}: n lines from
// lines[first] on; line l takes row l / divisor of the activations and gives row l of out; an expert's matrix begins
// matrix_bytes after the one before.
#define PRODUCT_PARAMETERS                                                                                            \
  const uint8_t *tiles, int32_t tile_bytes, int32_t matrix_bytes, int32_t out_rows, int32_t cols,                     \
      const uint8_t *activations, const float *bias, const int32_t *count, const int32_t *items,                      \
      const int32_t *item_count, const int32_t *lines, int32_t divisor, float *out
#define PRODUCT_ARGUMENTS                                                                                             \
  {tiles, tile_bytes, matrix_bytes, out_rows, cols, activations, bias, count, items, item_count, lines, divisor, out}
struct Product {
  const uint8_t* tiles;
  int tile_bytes, matrix_bytes, out_rows, cols;
  const uint8_t* activations;
  const float* bias;
  const int32_t *count, *items, *item_count, *lines;
  int divisor;
  float* out;

  DEVICE int tile_count() const { return (out_rows + 15) / 16; }
};

// What one block computes, n rows at most; none: n <= 0.
struct Share {
  int expert, first, n;
};
DEVICE Share share_of(const Product& p, int place, int most) {
  if (p.items == nullptr) {
    const int first = most * place, left = *p.count - first;
    return {0, first, left < most ? left : most};
  }
  if (place >= *p.item_count) return {0, 0, 0};
  const int32_t* item = p.items + 3 * place;
  return {item[0], item[1], item[2]};
}
DEVICE int out_row(const Product& p, const Share& share, int i) {
  return p.items == nullptr ? share.first + i : p.lines[share.first + i];
}
// Rows past the last are the last one: they are computed like it and thrown away.
DEVICE int activation_row(const Product& p, const Share& share, int i) {
  const int row = out_row(p, share, i < share.n ? i : share.n - 1);
  return p.items == nullptr ? row : row / p.divisor;
}
DEVICE const uint8_t* tile_of(const Product& p, const Share& share, int tile) {
  return p.tiles + static_cast<size_t>(share.expert) * p.matrix_bytes + static_cast<size_t>(tile) * p.tile_bytes;
}

DEVICE void store_result(const Product& p, int line, int row, float x) {
  if (row >= p.out_rows) return;
  if (p.bias != nullptr) x = add(x, p.bias[row]);
  p.out[static_cast<size_t>(line) * p.out_rows + row] = canonical(x);
}

}  // namespace
}  // namespace llamaclust::cuda
