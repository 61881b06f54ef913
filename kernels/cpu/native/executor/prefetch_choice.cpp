#include "executor/prefetch_choice.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "runtime/cache_size.h"
#include "runtime/memory.h"
#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

std::atomic<std::optional<Prefetch>> found;
static_assert(std::atomic<std::optional<Prefetch>>::is_always_lock_free);

size_t bytes_of(const Matrix& matrix) { return static_cast<size_t>(matrix.tile_count()) * matrix.tile_bytes; }

// Returns the first weights, about twice the size of the last-level cache, or none if the cache holds all weights.
std::span<const Matrix> compared_of(std::span<const Matrix> weights, int threads) {
  const size_t cache = last_cache_bytes(threads);
  size_t count = 0, bytes = 0;
  while (count < weights.size() && bytes < 2 * cache) bytes += bytes_of(weights[count++]);
  return weights.first(bytes < cache ? 0 : count);
}

// Products of one token whose activations are 0. They take as long as any other product.
class Comparison {
 public:
  Comparison(const MatmulOps& ops, std::span<const Matrix> weights, int threads)
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

  int64_t ns(Prefetch way) {
    const int64_t start = now_ns();
    pool_.run([&](int thread) {
      uint8_t* scratch = scratches_[static_cast<size_t>(thread)].data();
      for (const Matrix& matrix : weights_) {
        const auto border = [&](int64_t n) { return static_cast<int>(n * matrix.tile_count() / pool_.threads()); };
        ops_.matmul(matrix, activations_.data(), 1, {}, out_.data(), out_.size(), nullptr, border(thread),
                    border(thread + 1), scratch, way);
        pool_.barrier().arrive();
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

Prefetch faster(Comparison& comparison) {
  constexpr size_t kPairs = 9, kFewPairs = 3;
  // Fewer pairs are measured if the weights take longer, as with a large cache.
  constexpr int64_t kEnoughNs = 100'000'000;
  std::vector<int64_t> far_ns, near_ns;
  comparison.ns(Prefetch::Far);  // Loads weights from disk into memory.
  const int64_t start = now_ns();
  while (far_ns.size() < kFewPairs || (far_ns.size() < kPairs && now_ns() - start < kEnoughNs)) {
    const bool far_first = far_ns.size() % 2 == 0;
    if (far_first) far_ns.push_back(comparison.ns(Prefetch::Far));
    near_ns.push_back(comparison.ns(Prefetch::Near));
    if (!far_first) far_ns.push_back(comparison.ns(Prefetch::Far));
  }
  return faster_prefetch(far_ns, near_ns);
}

}  // namespace

Prefetch prefetch_of_process() { return known_prefetch().value_or(Prefetch::Far); }

std::optional<Prefetch> known_prefetch() { return found.load(std::memory_order_relaxed); }

void set_known_prefetch(std::optional<Prefetch> way) { found.store(way, std::memory_order_relaxed); }

void choose_prefetch(const MatmulOps& ops, std::span<const Matrix> weights, int threads) {
  const std::span<const Matrix> compared = compared_of(weights, threads);
  if (compared.empty()) return;
  // Concurrent measurements, of stages that are loaded together, would share the memory bandwidth.
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (known_prefetch()) return;
  try {
    Comparison comparison(ops, compared, threads);
    set_known_prefetch(faster(comparison));
  } catch (const std::bad_alloc&) {
  } catch (const std::runtime_error&) {  // Threads could not be started.
  }
}

Prefetch faster_prefetch(std::span<const int64_t> far_ns, std::span<const int64_t> near_ns) {
  constexpr double kClearlyLess = 0.97;
  std::vector<double> ratios;
  for (size_t i = 0; i < far_ns.size(); i++)
    ratios.push_back(static_cast<double>(near_ns[i]) / static_cast<double>(far_ns[i]));
  const auto middle = ratios.begin() + static_cast<std::ptrdiff_t>(ratios.size() / 2);
  std::nth_element(ratios.begin(), middle, ratios.end());
  return *middle < kClearlyLess ? Prefetch::Near : Prefetch::Far;
}

}  // namespace llamaclust
