// Attention of many queries, as in prefill.
#include "tile.cuh"
#include "byte_values.cuh"
#include "values.cuh"

namespace llamaclust::cuda {

// Grid: (any number of blocks, KV heads times parts of TQ query heads that share one), blocks of 256. A tile has TQ
// divided by these heads rows, one at least (attention_rows.plan's tile_rows).
#define TILE(kv_name, TQ, Kv, Scores)                                                                                 \
  ATTENTION_KERNEL(tile_##kv_name##_##TQ, TQ, Kv, Scores, Work::kMany, scores_floats<TQ>(Scores<TQ>{}, head_dim), \
                   add_values<1>)
TILE(f16, 16, F16Kv, F16Tile)
TILE(f16, 32, F16Kv, F16Tile)
TILE(q8_0, 16, Q8Kv, Q8Tile)
TILE(int8, 16, Int8Kv, Int8Tile)

}  // namespace llamaclust::cuda
