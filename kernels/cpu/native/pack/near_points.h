// Tables of the grid points that are nearest to any combination of levels. A search for the best point considers only
// these.
#pragma once

#include <cstdint>
#include <vector>

#include "level/matmul_ops.h"

namespace llamaclust {

// A point: its index, and the levels of its first and its second half as half_code().
struct NearPoint {
  uint16_t index;
  uint8_t first, second;
};

// Encodes the levels of half a point: four of three levels, or two of eight.
constexpr int half_code(const uint8_t* levels, int dims) {
  return dims == 8 ? levels[0] + 3 * levels[1] + 16 * (levels[2] + 3 * levels[3]) : levels[0] + 8 * levels[1];
}

inline constexpr int kMostNear = 32;

struct NearPoints {
  int dims;  // Weights of a point: 8 with three levels, or 4 with eight.
  int near;  // Number of points for each combination.
  // [combination of levels, as a number in base 3 or 8][near], the nearest point first.
  std::vector<NearPoint> points;
  std::vector<uint8_t> levels;  // [point][dims]
};

// Returns the table of a type, which is built on first use and shared by all threads; null for a type without a grid.
const NearPoints* near_points(QuantType type);

}  // namespace llamaclust
