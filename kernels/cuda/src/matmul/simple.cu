// Products with weights in blocks of 32 columns.
#include "kernels.cuh"
#include "level/quants/simple.h"

namespace llamaclust::cuda {

LLAMACLUST_SIMPLE_TYPES(MATMUL_KERNELS)

}  // namespace llamaclust::cuda
