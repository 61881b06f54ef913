#include "pack/grids.h"

namespace llamaclust {
namespace {

template <int count, int points>
GridColumns<points, count> columns_of(const Grid<points>& grid) {
  GridColumns<points, count> columns;
  for (int n = 0; n < points; n++)
    for (int i = 0; i < count; i++) columns.of[n][i] = level_of(grid.point[n], count, i);
  return columns;
}

}  // namespace

const GridColumns<256, 8> kIQ2_XXSColumns = columns_of<8>(kIQ2_XXSGrid);
const GridColumns<512, 8> kIQ2_XSColumns = columns_of<8>(kIQ2_XSGrid);
const GridColumns<256, 4> kIQ3_XXSColumns = columns_of<4>(kIQ3_XXSGrid);

}  // namespace llamaclust
