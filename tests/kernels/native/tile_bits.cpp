// Prints what the loops of tiles compute with a model of tile registers, over the level that the command names.
#include "level_bits.h"
#include "runtime/float_mode.h"
#include "runtime/levels.h"

namespace llamaclust::tile_model {
extern const MatmulOps matmul_ops;
}

int main(int count, char** words) {
  if (count != 2) return 2;
  const llamaclust::FloatMode mode;
  llamaclust::Level level = llamaclust::find_level(words[1]);
  level.name = "tile_model";
  level.matmul = llamaclust::tile_model::matmul_ops;
  level_bits::print_products(level);
  return 0;
}
