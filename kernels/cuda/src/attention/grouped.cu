// Attention of rows that attend to later positions: those of their group (such as an image's rows in a prompt), or in
// an encoder those of their group only, or the whole sequence. The kernels are those of rows.cu and tile.cu.
#define LLAMACLUST_GROUPS
#include "tile.cuh"
#include "byte_values.cuh"
#include "plan.cuh"
#include "values.cuh"

namespace llamaclust::cuda {

PLAN

TILE(f16, 16, F16Kv, F16Tile)
TILE(f16, 32, F16Kv, F16Tile)
TILE(q8_0, 16, Q8Kv, Q8Tile)
TILE(int8, 16, Int8Kv, Int8Tile)

}  // namespace llamaclust::cuda
