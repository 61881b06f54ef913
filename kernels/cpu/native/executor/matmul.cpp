// Matrix products: threads split tiles of 16 output rows, never the sum over k.
#include "executor/worker.h"
#include "level/activations.h"

namespace llamaclust {

void Worker::multiply(const Product& product, int tile_begin, int tile_end) {
  run_.level.matmul.matmul(product.weight, slot(product.slot), rows_ * buffer(product.out).multiple, {},
                           line(product.out, 0), static_cast<size_t>(product.weight.rows),
                           product.bias.empty() ? nullptr : product.bias.data(), tile_begin, tile_end,
                           run_.workspace.scratch(thread_));
}

void Worker::execute(const MatmulStep& step) {
  int64_t tiles = 0;
  for (const Product& product : step.products) tiles += product.weight.tile_count();
  const auto multiply_tiles = [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Product& product : step.products) {
      const int64_t count = product.weight.tile_count();
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, count);
      if (from < to) multiply(product, static_cast<int>(from), static_cast<int>(to));
      first += count;
    }
  };
  if (rows_ > kFewRows)
    share(tiles, kPanelTiles, multiply_tiles);
  else if (rows_ > 0)
    share(tiles, 1, fixed_tiles(tiles, threads_), multiply_tiles);
  else
    share(0, 1, multiply_tiles);
}

}  // namespace llamaclust
