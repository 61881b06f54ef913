// Products with types of 32-wide blocks.
#include "kernels.cuh"
#include "level/quants/iq4_nl.h"
#include "level/quants/mxfp4.h"
#include "level/quants/q4_0.h"
#include "level/quants/q4_1.h"
#include "level/quants/q5_0.h"
#include "level/quants/q5_1.h"
#include "level/quants/q8_0.h"

namespace llamaclust::cuda {

MATMUL_KERNELS(Q4_0)
MATMUL_KERNELS(Q4_1)
MATMUL_KERNELS(Q5_0)
MATMUL_KERNELS(Q5_1)
MATMUL_KERNELS(Q8_0)
MATMUL_KERNELS(IQ4_NL)
MATMUL_KERNELS(MXFP4)

}  // namespace llamaclust::cuda
