// In place of simd/amx/tiles.h: the same operations in plain C++, as Intel's manual defines LDTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TDPBSSD and TILERELEASE (volume 2). What a processor would refuse ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Tile {
  int rows, row_bytes;  // 0: not configured
  uint8_t data[16][64];
};
Tile tiles[8] = {};

[[maybe_unused]] void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

[[maybe_unused]] Tile& configured(int tile) {
  require(tiles[tile].rows > 0, "not configured");
  return tiles[tile];
}

// Bytes past the end of a row and rows past the last are cleared by whatever writes a tile.
[[maybe_unused]] void clear(Tile& tile) { memset(tile.data, 0, sizeof tile.data); }

template <int k_groups>
class TileShapes {
 public:
  TileShapes() {
    for (int i = 0; i < 8; i++) {
      require(tiles[i].rows == 0, "configured twice");
      tiles[i] = {i < 6 ? 16 : k_groups, i == 4 || i == 5 ? 4 * k_groups : 64, {}};
    }
  }
  ~TileShapes() {
    for (Tile& tile : tiles) tile = {};
  }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

template <int tile>
void tile_load(const void* p, int64_t stride) {
  Tile& to = configured(tile);
  clear(to);
  for (int row = 0; row < to.rows; row++)
    memcpy(to.data[row], static_cast<const uint8_t*>(p) + row * stride, static_cast<size_t>(to.row_bytes));
}

template <int tile>
void tile_store(void* p, int64_t stride) {
  const Tile& from = configured(tile);
  for (int row = 0; row < from.rows; row++)
    memcpy(static_cast<uint8_t*>(p) + row * stride, from.data[row], static_cast<size_t>(from.row_bytes));
}

template <int tile>
void tile_zero() {
  clear(configured(tile));
}

template <int sums, int first, int second>
void tile_dot() {
  static_assert(sums != first && sums != second && first != second);  // an invalid instruction otherwise
  Tile& to = configured(sums);
  const Tile &a = configured(first), &b = configured(second);
  require(to.rows == a.rows && a.row_bytes == 4 * b.rows && to.row_bytes == b.row_bytes, "shapes do not match");
  for (int m = 0; m < to.rows; m++)
    for (int n = 0; n < to.row_bytes / 4; n++) {
      int32_t sum;
      memcpy(&sum, to.data[m] + 4 * n, 4);
      for (int k = 0; k < b.rows; k++)
        for (int i = 0; i < 4; i++)
          sum += static_cast<int8_t>(a.data[m][4 * k + i]) * static_cast<int8_t>(b.data[k][4 * n + i]);
      memcpy(to.data[m] + 4 * n, &sum, 4);
    }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
