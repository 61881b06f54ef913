// Rows of weight matrices as float32: embeddings of tokens and positions. A tile of a float type is columns of sixteen values.
#include "lines.cuh"

namespace llamaclust::cuda {

struct F32 {
  using Value = float;
  static DEVICE float widen(float x) { return x; }
};
struct F16 {
  using Value = uint16_t;
  static DEVICE float widen(uint16_t x) { return half_to_float(x); }
};
struct BF16 {
  using Value = uint16_t;
  static DEVICE float widen(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
};

// out[row] = weights of tokens[row]. Grid: (width / 1024 rounded up, rows), blocks of 256.
template <class Type>
DEVICE void embed(const int32_t* tokens, const uint8_t* tiles, int tile_bytes, int width, const int32_t* rows,
                  float* out) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  const int index = tokens[row];
  const uint8_t* tile = tiles + line(index / 16, tile_bytes);
  const auto* column = reinterpret_cast<const typename Type::Value*>(tile) + index % 16;
  out += line(row, width);
  for (int i = kPiece * blockIdx.x + threadIdx.x, k = 0; k < 4; i += 256, k++)
    if (i < width) out[i] = Type::widen(column[16 * i]);
}

#define FLOAT_TYPE(Type, name)                                                                                        \
  KERNEL(256, embed_##name, const int32_t* __restrict__ tokens, const uint8_t* __restrict__ tiles, int32_t tile_bytes, \
         int32_t width, const int32_t* rows, float* __restrict__ out) {                                               \
    embed<Type>(tokens, tiles, tile_bytes, width, rows, out);                                                         \
  }

FLOAT_TYPE(F32, f32)
FLOAT_TYPE(F16, f16)
FLOAT_TYPE(BF16, bf16)

}  // namespace llamaclust::cuda
