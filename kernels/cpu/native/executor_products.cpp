// Matrix products: threads split tiles of 16 output rows, never the sum over k.
#include "executor_worker.h"
#include "matrix.h"
#include "pack.h"

namespace llamaclust {

void Worker::multiply(const Product& product, int tile_begin, int tile_end) {
  run_.level.matmul.matmul(product.weight, slot(product.slot), rows_ * buffer(product.out).multiple,
                           line(product.out, 0), static_cast<size_t>(product.weight.rows),
                           product.bias.empty() ? nullptr : product.bias.data(), tile_begin, tile_end,
                           run_.workspace.scratch(thread_));
}

void Worker::execute(const ProductsStep& step) {
  int64_t tiles = 0;
  for (const Product& product : step.products) tiles += product.weight.tile_count();
  share(rows_ > 0 ? tiles : 0, rows_ > kPrivateRows ? kPanelTiles : 1, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (const Product& product : step.products) {
      const int64_t count = product.weight.tile_count();
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, count);
      if (from < to) multiply(product, static_cast<int>(from), static_cast<int>(to));
      first += count;
    }
  });
}

void Worker::multiply_experts(const ExpertsStep& step, int line_index, int tile_begin, int tile_end) {
  const int row = line_index / step.used, rank = line_index % step.used;
  const size_t expert = static_cast<size_t>(line(step.choice, row)[rank]);
  const int activation_line = step.per_rank ? line_index : row;
  int first = 0;
  for (const ExpertProduct& product : step.products) {
    const Matrix& weight = product.experts[expert];
    const size_t bytes = activation_bytes(tile_layout(weight.type).activation, weight.cols);
    const int from = std::max(tile_begin - first, 0), to = std::min(tile_end - first, weight.tile_count());
    if (from < to)
      run_.level.matmul.matmul(
          weight, slot(step.slot) + static_cast<size_t>(activation_line) * bytes, 1,
          line(product.out, 0) + static_cast<size_t>(line_index) * static_cast<size_t>(weight.rows),
          static_cast<size_t>(weight.rows), nullptr, from, to, run_.workspace.scratch(thread_));
    first += weight.tile_count();
  }
}

void Worker::execute(const ExpertsStep& step) {
  int64_t tiles = 0;
  for (const ExpertProduct& product : step.products) tiles += product.experts[0].tile_count();
  share(tiles * step.used * rows_, 1, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t line_index = begin / tiles, stop = std::min(end, (line_index + 1) * tiles);
      multiply_experts(step, static_cast<int>(line_index), static_cast<int>(begin - line_index * tiles),
                       static_cast<int>(stop - line_index * tiles));
      begin = stop;
    }
  });
}

}  // namespace llamaclust
