// Attention of rows that see later positions: their group (as an image's rows in a prompt do), or in an encoder their group
// alone or the whole sequence. Kernels as in rows.cu and tile.cu.
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
