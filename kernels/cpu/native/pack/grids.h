// The grids of ggml's IQ types: the levels of four or eight weights for each index. Decoders define the weight of a
// level (level/quants/).
#pragma once

#include <cstdint>

namespace llamaclust {

#ifndef GRID_MEMORY
#define GRID_MEMORY  // Memory space of the tables, on devices that have several.
#endif
#ifndef TABLE
#define TABLE constexpr
#endif

// A point has 16 bits: two for each of eight levels, or four for each of four. Level i is in byte i % 2, at bit (i / 2)
// * (bits of a level).
template <int points>
struct Grid {
  static constexpr int kPoints = points;
  alignas(64) uint16_t point[points];
  // half[0] has the first half of each point's levels, half[1] the second; the first level has the lowest bits.
  alignas(64) uint8_t half[2][points];
};

// The levels of each point in order, one per byte, for feature levels that look up points row by row (AVX2). The tables
// are computed when the module is loaded.
template <int points, int count>
struct GridColumns {
  alignas(64) uint8_t of[points][count];
};

// Four levels (0, 1 or 2) are encoded in seven bits: as two bits each of a byte, they are the sum, modulo 256, of one
// entry of each table. (The first table combines the highest level with one of five patterns of the others; the second
// has eight deviations from a pattern.)
TABLE uint8_t kThirdsPlace[16] = {0, 4, 8, 36, 37, 64, 68, 72, 100, 101, 128, 132, 136, 164, 165};
TABLE uint8_t kThirdsAround[16] = {0, 5, 32, 2, 253, 18, 16, 17};

// Byte of a lane that holds each of four point indices, in the order in which decoders take them in pairs.
TABLE int kIndexPlace[4] = {0, 2, 1, 3};

extern GRID_MEMORY const Grid<256> kIQ2_XXSGrid;
extern GRID_MEMORY const Grid<512> kIQ2_XSGrid;
extern GRID_MEMORY const Grid<1024> kIQ2_SGrid;
extern GRID_MEMORY const Grid<256> kIQ3_XXSGrid;
extern GRID_MEMORY const Grid<512> kIQ3_SGrid;
extern GRID_MEMORY const Grid<2048> kIQ1Grid;
extern const GridColumns<256, 8> kIQ2_XXSColumns;
extern const GridColumns<512, 8> kIQ2_XSColumns;
extern const GridColumns<256, 4> kIQ3_XXSColumns;

// Returns level i of a point with `count` levels.
constexpr uint8_t level_of(uint16_t point, int count, int i) {
  const int bits = 16 / count;
  return static_cast<uint8_t>(point >> (8 * (i % 2) + i / 2 * bits) & ((1 << bits) - 1));
}

}  // namespace llamaclust
