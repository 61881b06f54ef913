// Defines the kernels of one quant type with its name. The macro takes a row of level/quant_types.h.
#pragma once

#include "dequantize.cuh"
#include "gemv.cuh"
#include "many_rows.cuh"  // here, since NVRTC's text has each file once: in one branch, it would be missing in the other
#if LLAMACLUST_WGMMA
#include "wgmma.cuh"
#else
#include "gemm.cuh"
#endif

#if LLAMACLUST_WGMMA
#define GEMM_KERNELS(TYPE)                                                                                            \
  KERNEL_IN_BLOCKS(384, 1, gemm_##TYPE, MATMUL_PARAMETERS) { gemm<TYPE, 64>(MATMUL_ARGUMENTS); }                       \
  KERNEL_IN_BLOCKS(256, 1, gemm_wide_##TYPE, MATMUL_PARAMETERS) { gemm<TYPE, 128>(MATMUL_ARGUMENTS); }
#else
#define GEMM_KERNELS(TYPE) \
  KERNEL_IN_BLOCKS(512, 1, gemm_##TYPE, MATMUL_PARAMETERS) { gemm<TYPE>(MATMUL_ARGUMENTS); }
#endif

#define MATMUL_KERNELS(TYPE, ...)                                                                                     \
  KERNEL_IN_BLOCKS(kWarp * kGemvWarps, kGemvBlocks, gemv_##TYPE, MATMUL_PARAMETERS, int32_t turn) {                   \
    gemv<TYPE>(MATMUL_ARGUMENTS, turn);                                                                               \
  }                                                                                                                   \
  GEMM_KERNELS(TYPE)                                                                                                  \
  EMBED_KERNEL(TYPE)
