// Weights that a thread is to read next, fetched into its cache while it waits for the others or does small work.
#pragma once

#include <algorithm>

#include "executor/plan.h"

namespace llamaclust {

// How many tiles every thread is given to begin with where few rows synchronize them, and memory is the limit. Most: each change
// of place costs the fetches that ran ahead.
inline int64_t fixed_tiles(int64_t tiles, int threads) { return threads == 1 ? tiles : tiles * 7 / (8 * threads); }

class Lookahead {
 public:
  // Sets the target to this thread's own share of the step's tiles.
  void set_target(const MatmulStep& step, int thread, int threads) {
    if (target_ == &step) return;
    target_ = &step;
    int64_t tiles = 0;
    for (const Product& product : step.products) tiles += product.weight.tile_count();
    int64_t tile = fixed_tiles(tiles, threads) * thread;
    for (const Product& product : step.products) {
      const Matrix& weight = product.weight;
      if (tile < weight.tile_count()) {
        next_ = weight.tiles + static_cast<size_t>(tile) * weight.tile_bytes;
        const size_t left = static_cast<size_t>(weight.tile_count() - tile) * weight.tile_bytes;
        end_ = next_ + std::min(left, kMostBytes);
        return;
      }
      tile -= weight.tile_count();
    }
  }

  // Prefetches some cache lines, about as many as can be in flight at once; false where there are none left.
  bool fetch() {
    for (int lines = kLines; lines > 0 && next_ < end_; lines--, next_ += 64) __builtin_prefetch(next_, 0, 2);
    return next_ < end_;
  }

 private:
  static constexpr int kLines = 64;
  static constexpr size_t kMostBytes = 256 << 10;  // a quarter of a common second-level cache

  const MatmulStep* target_ = nullptr;
  const uint8_t *next_ = nullptr, *end_ = nullptr;
};

}  // namespace llamaclust
