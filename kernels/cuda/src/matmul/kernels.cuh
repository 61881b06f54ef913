// The kernels of one quant type, by its name; the macro takes a row of level/quant_types.h.
#pragma once

#include "dequantize.cuh"
#include "gemv.cuh"
#include "gemm.cuh"

#define MATMUL_KERNELS(TYPE, ...)                                                                                     \
  KERNEL_IN_BLOCKS(kWarp * kGemvWarps, kGemvBlocks, gemv_##TYPE, MATMUL_PARAMETERS) { gemv<TYPE>(MATMUL_ARGUMENTS); }  \
  KERNEL_IN_BLOCKS(512, 1, gemm_##TYPE, MATMUL_PARAMETERS) { gemm<TYPE>(MATMUL_ARGUMENTS); }                          \
  EMBED_KERNEL(TYPE)
