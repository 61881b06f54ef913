// Products with types of 32-wide blocks.
#include "kernels.cuh"
#include "level/quants/simple.h"

namespace llamaclust::cuda {

LLAMACLUST_SIMPLE_TYPES(MATMUL_KERNELS)

}  // namespace llamaclust::cuda
