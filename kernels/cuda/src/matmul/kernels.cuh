// The kernels of one quant type, by its name; the macro takes a row of level/quant_types.h.
#pragma once

#include "dequantize.cuh"
#include "gemv.cuh"
#include "gemm.cuh"

#define MATMUL_KERNELS(TYPE, ...)                                                                                    \
  KERNEL_IN_BLOCKS(256, kGemvBlocks<TYPE>, gemv_##TYPE, MATMUL_PARAMETERS, int32_t round) {                            \
    gemv<TYPE>(MATMUL_ARGUMENTS, round);                                                                     \
  }                                                                                                                   \
  KERNEL_IN_BLOCKS(512, 1, gemm_##TYPE, MATMUL_PARAMETERS) { gemm<TYPE>(MATMUL_ARGUMENTS); }               \
  KERNEL(256, embed_##TYPE, const int32_t* tokens, const uint8_t* tiles, int32_t tile_bytes, int32_t width,           \
         const int32_t* rows, float* out) {                                                                           \
    embed<TYPE>(tokens, tiles, tile_bytes, width, rows, out);                                                         \
  }
