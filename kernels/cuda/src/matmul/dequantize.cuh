// Rows of weights as float32, with the arithmetic of kernels/cpu/native/level/matmul/matmul.cpp.
#pragma once

#include "matmul.cuh"

namespace llamaclust::cuda {
namespace {

// Computes scale and min of sub-block j of one row.
template <class Type>
DEVICE void scale_of(const Segment& w, int j, int row, float& scale, float& min) {
  scale = Type::scale({w.tail, row});
  min = 0.0f;
  if constexpr (Type::kHasMin) min = Type::min({w.tail, row});
  if constexpr (kSubScaled<Type>) {
    Scale scales[Type::kSubBlocks];
    Type::sub_scales({w.body, row}, scales);
    scale = mul(scale, __int2float_rn(scales[j]));
    if constexpr (Type::kHasMin) {
      Bytes mins[Type::kSubBlocks / 4];
      Type::sub_mins({w.body, row}, mins);
      min = mul(min, -__int2float_rn(static_cast<int32_t>(mins[j / 4] >> j % 4 * 8 & 255)));
    }
  }
}

// Dequantizes columns 4 * group to 4 * group + 3 of a row of a tile.
template <class Type>
DEVICE float4 dequantize_group(const uint8_t* tile, int row, int segments, int group) {
  constexpr int of_segment = Type::kLayout.segment_cols / 4, of_sub_block = of_segment / Type::kSubBlocks;
  const Segment w = segment_of<Type>(tile, group / of_segment, segments);
  const int j = group % of_segment / of_sub_block;
  float scale, min;
  scale_of<Type>(w, j, row, scale, min);
  const int32_t q = signed_bytes<Type::kOffset>(Type::group({w.body, row}, j, group % of_sub_block));
  const auto value = [&](int i) { return add(mul(scale, __int2float_rn(static_cast<int8_t>(q >> 8 * i))), min); };
  return make_float4(value(0), value(1), value(2), value(3));
}

// out[row] = weights of tokens[row]. Grid: (width / 1024 rounded up, rows), blocks of 256 threads.
template <class Type>
DEVICE void embed(const int32_t* tokens, const uint8_t* tiles, int tile_bytes, int width, const int32_t* rows,
                  float* out) {
  const int row = blockIdx.y, group = 256 * blockIdx.x + threadIdx.x;
  if (row >= *rows || 4 * group >= width) return;
  const uint8_t* tile = tiles + static_cast<size_t>(tokens[row] / 16) * tile_bytes;
  const float4 four = dequantize_group<Type>(tile, tokens[row] % 16, width / Type::kLayout.segment_cols, group);
  store_four(out + static_cast<size_t>(row) * width + 4 * group, four);
}

}  // namespace
}  // namespace llamaclust::cuda
