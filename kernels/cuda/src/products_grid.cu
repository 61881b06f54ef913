// Products with types whose weights are points of a grid.
#include "simd/dot.h"
#include "pack/grid_points.h"
#include "product_kernels.cuh"
#include "level/quants/iq1_m.h"
#include "level/quants/iq1_s.h"
#include "level/quants/iq2_s.h"
#include "level/quants/iq2_xs.h"
#include "level/quants/iq2_xxs.h"
#include "level/quants/iq3_s.h"
#include "level/quants/iq3_xxs.h"

namespace llamaclust::cuda {

PRODUCT_KERNELS(IQ1_S)
PRODUCT_KERNELS(IQ1_M)
PRODUCT_KERNELS(IQ2_XXS)
PRODUCT_KERNELS(IQ2_XS)
PRODUCT_KERNELS(IQ2_S)
PRODUCT_KERNELS(IQ3_XXS)
PRODUCT_KERNELS(IQ3_S)

}  // namespace llamaclust::cuda
