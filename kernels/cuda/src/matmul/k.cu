// Products with types of 256-wide blocks whose quants stand in the tile.
#include "kernels.cuh"
#include "level/quants/k.h"

namespace llamaclust::cuda {

#if LLAMACLUST_WGMMA
namespace {

template <>
constexpr int kScaleBits<Q2_K> = 4;
template <>
constexpr int kScaleBits<Q4_K> = 6;
template <>
constexpr int kScaleBits<Q5_K> = 6;

}  // namespace
#endif

LLAMACLUST_K_TYPES(MATMUL_KERNELS)
LLAMACLUST_TERNARY_TYPES(MATMUL_KERNELS)

}  // namespace llamaclust::cuda
