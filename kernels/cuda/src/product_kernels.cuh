// The kernels of one quant type, by its name.
#pragma once

#include "dequantize.cuh"
#include "products_few.cuh"
#include "products_many.cuh"

#define PRODUCT_KERNELS(TYPE)                                                                                         \
  KERNEL_IN_BLOCKS(256, kFewBlocks<TYPE>, few_##TYPE, PRODUCT_PARAMETERS, int32_t round) {                            \
    multiply_few<TYPE>(PRODUCT_ARGUMENTS, round);                                                                     \
  }                                                                                                                   \
  KERNEL_IN_BLOCKS(512, 1, many_##TYPE, PRODUCT_PARAMETERS) { multiply_many<TYPE>(PRODUCT_ARGUMENTS); }               \
  KERNEL(256, embed_##TYPE, const int32_t* tokens, const uint8_t* tiles, int32_t tile_bytes, int32_t width,           \
         const int32_t* rows, float* out) {                                                                           \
    embed<TYPE>(tokens, tiles, tile_bytes, width, rows, out);                                                         \
  }
