// Attention of many queries, as in prefill.
#include "tile.cuh"
#include "byte_values.cuh"
#include "values.cuh"

namespace llamaclust::cuda {

TILE(f16, 16, F16Kv, F16Tile)
TILE(f16, 32, F16Kv, F16Tile)
TILE(q8_0, 16, Q8Kv, Q8Tile)
TILE(int8, 16, Int8Kv, Int8Tile)

}  // namespace llamaclust::cuda
