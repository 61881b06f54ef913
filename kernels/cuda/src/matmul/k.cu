// Products with weights in blocks of 256 columns whose tiles hold the quants themselves.
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
