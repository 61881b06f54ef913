// The grids of ggml's IQ types: for every index the levels of four or eight weights. Decoders define what a level
// stands for (level/quants/).
#pragma once

#include <cstdint>

namespace llamaclust {

#ifndef GRID_MEMORY
#define GRID_MEMORY  // where tables are, on machines that have several kinds of memory
#endif
#ifndef TABLE
#define TABLE constexpr
#endif

// A point is 16 bits, two for each of eight levels or four for each of four: level i in byte i % 2, at bit i / 2 times
// their number.
template <int points>
struct Grid {
  static constexpr int kPoints = points;
  alignas(64) uint16_t point[points];
  alignas(64) uint8_t half[2][points];  // the first half of a point's levels and the second, in order, the first lowest
};

// The levels of points in order, a byte each, for levels that look points up row by row (AVX2). Made when the module is
// loaded.
template <int points, int count>
struct GridColumns {
  alignas(64) uint8_t of[points][count];
};

// Any four levels of 0, 1 or 2 as two bits each of a byte are the sum, modulo 256, of an entry of each of these tables, so
// that seven bits name them. (The first has the highest level and one of five places, the second what is around a place.)
TABLE uint8_t kThirdsPlace[16] = {0, 4, 8, 36, 37, 64, 68, 72, 100, 101, 128, 132, 136, 164, 165};
TABLE uint8_t kThirdsAround[16] = {0, 5, 32, 2, 253, 18, 16, 17};

// Of four indices of points, the byte of a lane: in the order that decoders take them in pairs.
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

// Level i of a point of `count` levels.
constexpr uint8_t level_of(uint16_t point, int count, int i) {
  const int bits = 16 / count;
  return static_cast<uint8_t>(point >> (8 * (i % 2) + i / 2 * bits) & ((1 << bits) - 1));
}

}  // namespace llamaclust
