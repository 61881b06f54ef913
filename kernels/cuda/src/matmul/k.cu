// Products with types of 256-wide blocks whose quants stand in the tile. (TQ1_0 lies there as TQ2_0 does.)
#include "kernels.cuh"
#include "level/quants/iq4_xs.h"
#include "level/quants/q2_k.h"
#include "level/quants/q3_k.h"
#include "level/quants/q4_k.h"
#include "level/quants/q5_k.h"
#include "level/quants/q6_k.h"
#include "level/quants/tq2_0.h"

namespace llamaclust::cuda {

MATMUL_KERNELS(Q2_K)
MATMUL_KERNELS(Q3_K)
MATMUL_KERNELS(Q4_K)
MATMUL_KERNELS(Q5_K)
MATMUL_KERNELS(Q6_K)
MATMUL_KERNELS(IQ4_XS)
MATMUL_KERNELS(TQ2_0)

}  // namespace llamaclust::cuda
