// Products with types of 256-wide blocks whose quants stand in the tile. (TQ1_0 lies there as TQ2_0 does.)
#include "kernels.cuh"
#include "level/quants/k.h"

namespace llamaclust::cuda {

LLAMACLUST_K_TYPES(MATMUL_KERNELS)
MATMUL_KERNELS(TQ2_0)

}  // namespace llamaclust::cuda
