#include "pack/near_points.h"

#include <algorithm>
#include <array>
#include <utility>

#include "pack/grids.h"

namespace llamaclust {
namespace {

constexpr float kThirds[] = {8, 25, 43}, kAround[] = {-1, 0, 1};
constexpr float kEighths[] = {1, 3, 5, 7, 9, 11, 13, 15};

template <int points>
NearPoints make(const Grid<points>& grid, int dims, const float* values) {
  const int levels = dims == 8 ? 3 : 8, near = std::min(points, kMostNear);
  int combinations = 1;
  for (int i = 0; i < dims; i++) combinations *= levels;
  NearPoints made{dims, near, {}, {}};
  for (int p = 0; p < points; p++)
    for (int i = 0; i < dims; i++) made.levels.push_back(level_of(grid.point[p], dims, i));
  std::vector<std::pair<float, int>> order(points);
  for (int number = 0; number < combinations; number++) {
    for (int p = 0; p < points; p++) {
      float apart = 0;
      for (int i = 0, digits = number; i < dims; i++, digits /= levels) {
        const float step = values[digits % levels] - values[made.levels[p * dims + i]];
        apart += step * step;
      }
      order[p] = {apart, p};
    }
    std::partial_sort(order.begin(), order.begin() + near, order.end());
    for (int k = 0; k < near; k++) {
      const int p = order[k].second;
      const uint8_t* at = &made.levels[p * dims];
      made.points.push_back({static_cast<uint16_t>(p), static_cast<uint8_t>(half_code(at, dims)),
                             static_cast<uint8_t>(half_code(at + dims / 2, dims))});
    }
  }
  return made;
}

}  // namespace

const NearPoints* near_points(QuantType type) {
  switch (type) {
#define NEAR(name, grid, dims, values)                       \
  case QuantType::name: {                                    \
    static const NearPoints made = make(grid, dims, values); \
    return &made;                                            \
  }
    NEAR(IQ2_XXS, kIQ2_XXSGrid, 8, kThirds)
    NEAR(IQ2_XS, kIQ2_XSGrid, 8, kThirds)
    NEAR(IQ2_S, kIQ2_SGrid, 8, kThirds)
    NEAR(IQ3_XXS, kIQ3_XXSGrid, 4, kEighths)
    NEAR(IQ3_S, kIQ3_SGrid, 4, kEighths)
    NEAR(IQ1_S, kIQ1Grid, 8, kAround)
    case QuantType::IQ1_M: return near_points(QuantType::IQ1_S);
#undef NEAR
    default: return nullptr;
  }
}

}  // namespace llamaclust
