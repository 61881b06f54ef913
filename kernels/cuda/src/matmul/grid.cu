// Products with types whose weights are points of a grid.
#include "simd/dot.h"
#include "pack/grid_points.h"
#include "kernels.cuh"
#include "level/quants/iq1_m.h"
#include "level/quants/iq1_s.h"
#include "level/quants/iq2_s.h"
#include "level/quants/iq2_xs.h"
#include "level/quants/iq2_xxs.h"
#include "level/quants/iq3_s.h"
#include "level/quants/iq3_xxs.h"

namespace llamaclust::cuda {

MATMUL_KERNELS(IQ1_S)
MATMUL_KERNELS(IQ1_M)
MATMUL_KERNELS(IQ2_XXS)
MATMUL_KERNELS(IQ2_XS)
MATMUL_KERNELS(IQ2_S)
MATMUL_KERNELS(IQ3_XXS)
MATMUL_KERNELS(IQ3_S)

}  // namespace llamaclust::cuda
