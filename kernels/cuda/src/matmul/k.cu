// Products with types of 256-wide blocks whose quants stand in the tile.
#include "kernels.cuh"
#include "level/quants/k.h"

namespace llamaclust::cuda {

LLAMACLUST_K_TYPES(MATMUL_KERNELS)
LLAMACLUST_TERNARY_TYPES(MATMUL_KERNELS)

}  // namespace llamaclust::cuda
