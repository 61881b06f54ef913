// Products with types whose weights are points of a grid.
#include "simd/dot.h"
#include "pack/grid_points.h"
#include "kernels.cuh"
#include "level/quants/grid.h"

namespace llamaclust::cuda {

LLAMACLUST_GRID_TYPES(MATMUL_KERNELS)

}  // namespace llamaclust::cuda
