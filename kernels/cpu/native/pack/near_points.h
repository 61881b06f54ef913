// Which points of a grid lie near any combination of levels: what a search for the best point looks at.
#pragma once

#include <cstdint>
#include <vector>

#include "level/matmul_ops.h"

namespace llamaclust {

// A point by its index, and its levels as a number for its first half and one for the other: two levels a digit, see
// `half_code`.
struct NearPoint {
  uint16_t index;
  uint8_t first, second;
};

// Levels of half a point: four of three levels, or two of eight.
constexpr int half_code(const uint8_t* levels, int dims) {
  return dims == 8 ? levels[0] + 3 * levels[1] + 16 * (levels[2] + 3 * levels[3]) : levels[0] + 8 * levels[1];
}

inline constexpr int kMostNear = 32;

struct NearPoints {
  int dims;                       // weights of a point: 8 of three levels, or 4 of eight
  int near;                       // how many are kept
  std::vector<NearPoint> points;  // [combination of levels, a number in base 3 or 8][near], the nearest first
  std::vector<uint8_t> levels;    // [point][dims]
};

// Made on first use, once for all threads; null for a type without a grid.
const NearPoints* near_points(QuantType type);

}  // namespace llamaclust
