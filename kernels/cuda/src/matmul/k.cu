// Products with types of 256-wide blocks whose quants stand in the tile.
#include "kernels.cuh"
#include "level/quants/k.h"

namespace llamaclust::cuda {

#if LLAMACLUST_WGMMA
namespace {

template <>
struct Digits<Q2_K> : DigitsOf<1, 4, false> {};
template <>
struct Digits<Q3_K> : DigitsOf<2, 3, true> {};
template <>
struct Digits<Q4_K> : DigitsOf<2, 3, false> {};
template <>
struct Digits<Q5_K> : DigitsOf<2, 3, false> {};
template <>
struct Digits<Q6_K> : DigitsOf<3, 3, true> {};

}  // namespace
#endif

LLAMACLUST_K_TYPES(MATMUL_KERNELS)
LLAMACLUST_TERNARY_TYPES(MATMUL_KERNELS)

}  // namespace llamaclust::cuda
