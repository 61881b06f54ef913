#include "executor/weight_fetch.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "runtime/cache_size.h"
#include "runtime/memory.h"
#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

constexpr size_t kMostBytes = size_t{512} << 20;

std::atomic<WeightFetch> found = WeightFetch::Far;
std::once_flag once;

size_t bytes_of(const Matrix& matrix) { return static_cast<size_t>(matrix.tile_count()) * matrix.tile_bytes; }

// The first of the weights, about twice as many as the last cache holds; none where all of them are fewer than it holds.
std::span<const Matrix> tried_of(std::span<const Matrix> weights, int threads) {
  const size_t cache = last_cache_bytes(threads);
  size_t count = 0, bytes = 0;
  while (count < weights.size() && bytes < std::min(2 * cache, kMostBytes)) bytes += bytes_of(weights[count++]);
  return weights.first(bytes < std::min(cache, kMostBytes) ? 0 : count);
}

// Products of a token that is all zero, which take as long as any.
class Trial {
 public:
  Trial(const MatmulOps& ops, std::span<const Matrix> weights, int threads)
      : ops_(ops), weights_(weights), pool_(threads) {
    size_t activations = 0, rows = 0;
    for (const Matrix& matrix : weights) {
      activations = std::max(activations, activation_bytes(tile_layout(matrix.type).activation, matrix.cols));
      rows = std::max(rows, static_cast<size_t>(matrix.rows));
    }
    activations_ = Memory(activations);
    out_.resize(rows);
    for (int thread = 0; thread < threads; thread++) scratches_.emplace_back(kMatmulScratchBytes);
  }

  int64_t ns(WeightFetch fetch) {
    const int64_t start = now_ns();
    pool_.run([&](int thread) {
      uint8_t* scratch = scratches_[static_cast<size_t>(thread)].data();
      for (const Matrix& matrix : weights_) {
        const auto border = [&](int64_t n) { return static_cast<int>(n * matrix.tile_count() / pool_.threads()); };
        ops_.matmul(matrix, activations_.data(), 1, {}, out_.data(), out_.size(), nullptr, border(thread),
                    border(thread + 1), scratch, fetch);
      }
    });
    return now_ns() - start;
  }

 private:
  const MatmulOps& ops_;
  const std::span<const Matrix> weights_;
  ThreadPool pool_;
  Memory activations_;
  std::vector<float> out_;
  std::vector<Memory> scratches_;
};

WeightFetch faster(Trial& trial) {
  constexpr int kPairs = 9;
  int near_wins = 0;
  trial.ns(WeightFetch::Far);  // what is on disk comes into memory
  for (int pair = 0; pair < kPairs; pair++) {
    const WeightFetch first = pair % 2 == 0 ? WeightFetch::Near : WeightFetch::Far;
    const int64_t first_ns = trial.ns(first);
    const int64_t second_ns = trial.ns(first == WeightFetch::Near ? WeightFetch::Far : WeightFetch::Near);
    near_wins += (first == WeightFetch::Near) == (first_ns < second_ns);
  }
  return 2 * near_wins > kPairs ? WeightFetch::Near : WeightFetch::Far;
}

}  // namespace

WeightFetch weight_fetch() { return found.load(std::memory_order_relaxed); }

void find_weight_fetch(const MatmulOps& ops, std::span<const Matrix> weights, int threads) {
  const std::span<const Matrix> tried = tried_of(weights, threads);
  if (tried.empty()) return;
  std::call_once(once, [&] {
    Trial trial(ops, tried, threads);
    found.store(faster(trial), std::memory_order_relaxed);
  });
}

}  // namespace llamaclust
