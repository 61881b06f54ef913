// One thread's part in a run.
#pragma once

#include <algorithm>
#include <functional>

#include "executor/executor.h"

namespace llamaclust {

// Number of tiles that are assigned to threads in advance, for few rows, where memory is the bottleneck. It is most of
// them, because a thread that takes tiles elsewhere loses the lines that were prefetched.
inline int64_t fixed_tiles(int64_t tiles) { return tiles * 7 / 8; }

// Prefetches the weights that a thread reads next, while it waits for other threads or does small work.
class Lookahead {
 public:
  // Sets the target to the step's tiles, starting with `tile`.
  void set_target(const MatmulStep& step, int64_t tile) {
    if (target_ == &step) return;
    target_ = &step;
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

  // Prefetches some cache lines, about as many as can be in flight at once. Returns false if none are left.
  bool fetch() {
    for (int lines = kLines; lines > 0 && next_ < end_; lines--, next_ += 64) __builtin_prefetch(next_, 0, 2);
    return next_ < end_;
  }

 private:
  static constexpr int kLines = 64;
  static constexpr size_t kMostBytes = 256 << 10;  // A quarter of a common L2 cache.

  const MatmulStep* target_ = nullptr;
  const uint8_t *next_ = nullptr, *end_ = nullptr;
};

class Worker {
 public:
  Worker(Stage& stage, ThreadPool& pool, int thread)
      : stage_(stage),
        band_(&stage.whole),
        barrier_(pool.barrier()),
        speeds_(pool.speeds()),
        thread_(thread),
        threads_(pool.active_threads()) {
    set_rows(batch().rows());
  }

  void work();

 private:
  struct Range {
    int begin, end;
  };

  // Steps that are not row by row.
  void execute(const SelectStep& step);
  void execute(const MergeStep& step);
  void execute(const MatmulStep& step);
  void execute(const ExpertsStep& step);
  void execute(const HeadsStep& step);
  void execute(const AttentionStep& step);
  void execute(const ConvolveStep& step);
  void execute(const DeltaRuleStep& step);
  void execute(const ScanStep& step);
  void execute(const GatherStep& step);

  void work_in_bands(size_t at, size_t last);
  bool is_in_bands() const { return stage_.in_bands && !stage_.bands.empty(); }
  void store_band(const AttentionStep& step);
  void enter(const Band& band);
  bool run(size_t begin, size_t last);
  void finish_gather();
  void fail();
  // Returns what a thread does during a gather.
  std::function<void()> fetching() {
    return [this] {
      for (int i = 0; i < 4 && lookahead_.fetch(); i++) continue;
    };
  }
  void scan_head(const ScanStep& step, int sequence, int head);
  void scan_rows(const ScanStep& step, int head, int row, int rows, float* state);
  void compute(size_t begin, size_t end);
  void compute_row(const Step& step, int row);  // For row by row steps.
  void multiply_tiles(const MatmulStep& step, int64_t begin, int64_t end, Range rows);
  int64_t row_parts(int64_t panels) const;
  ExpertLines group_by_expert(const ExpertsStep& step) const;
  void multiply_expert(const ExpertsStep& step, const ExpertLines& groups, size_t expert, int tile_begin, int tile_end);

  void set_rows(int rows) {
    rows_ = rows;
    alone_ = rows <= kPrivateRows || threads_ == 1;
  }

  const Buffer& buffer(BufferId id) const { return stage_.plan.buffers[id]; }
  int line_width(BufferId id) const { return buffer(id).width * buffer(id).multiple; }

  const Batch& batch() const { return band_->batch; }
  const float* angles(int table, int row) const { return stage_.angles(table, band_->first + row); }

  // Returns a row's lines, in this thread's private copy if each thread computes all rows.
  float* line(BufferId id, int row) const {
    const bool own = rows_ <= kPrivateRows && buffer(id).private_copy;
    float* base = own ? stage_.workspace.own(id, thread_) : stage_.workspace.shared(id);
    const int first = own || (stage_.in_bands && buffer(id).is_local) ? 0 : first_;
    return base + static_cast<size_t>(first + row) * static_cast<size_t>(line_width(id));
  }
  uint8_t* slot(int index) const {
    return rows_ <= kPrivateRows ? stage_.workspace.own_slot(index, thread_) : stage_.workspace.shared_slot(index);
  }

  void synchronize(bool after_gather = false) {
    const WaitFor work = rows_ <= kFewRows ? WaitFor::FewRows : WaitFor::ManyRows;
    barrier_.arrive([this] { return lookahead_.fetch(); }, after_gather ? WaitFor::Gather : work);
  }

  // Returns the start of a thread's part of the first `fixed` units.
  int64_t fixed_begin(int64_t fixed, int64_t grain, int thread) const {
    return speeds_.begin(fixed / grain, thread) * grain;
  }

  // Calls f(begin, end) so that the threads together cover [0, count). Each thread first gets a part of the `fixed`
  // units by its speed; ready threads then take shrinking pieces of the rest. Pieces are multiples of `grain`, except
  // the last. The threads must synchronize between two calls. If `measures`, all units must take equally long.
  template <typename F>
  void share(int64_t count, int64_t grain, int64_t fixed, F f, bool measures = false) {
    if (threads_ == 1) return cover(0, count, grain, f);
    std::atomic<int64_t>& taken = stage_.shares.counters[round_ % 3].taken;
    if (thread_ == 0) stage_.shares.counters[(round_ + 2) % 3].taken.store(0, std::memory_order_relaxed);
    round_++;
    const int64_t rest = count - fixed_begin(fixed, grain, threads_);
    const int64_t own = fixed_begin(fixed, grain, thread_), next = fixed_begin(fixed, grain, thread_ + 1);
    if (own < next) {
      const int64_t start = measures ? now_ns() : 0;
      cover(own, next, grain, f);
      if (measures) speeds_.add(thread_, now_ns() - start);
    }
    int64_t begin = taken.load(std::memory_order_relaxed);
    while (begin < rest) {
      const int64_t fair = (rest - begin) / (2 * threads_) / grain * grain;
      const int64_t end = std::min(rest, begin + std::max(fair, grain));
      if (!taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      cover(count - rest + begin, count - rest + end, grain, f);
      begin = taken.load(std::memory_order_relaxed);
    }
  }

  // Shares with half of the units assigned in advance for few rows, where memory is the bottleneck. For many rows, none
  // is: a thread that loses its core then leaves the work to the others.
  template <typename F>
  void share(int64_t count, int64_t grain, F f) {
    share(count, grain, rows_ <= kFewRows ? count / 2 : 0, f);
  }

  // Calls f(begin, end) so that the threads together cover all rows; if each thread computes all rows for itself, for
  // all of them.
  template <typename F>
  void share_rows(F f) {
    constexpr int kRowsAtOnce = 4;
    for (int row = 0; alone_ && row < rows_; row += kRowsAtOnce) f(row, std::min(row + kRowsAtOnce, rows_));
    if (alone_) return;
    const int grain = std::clamp(rows_ / (2 * threads_), 1, kRowsAtOnce);
    share(rows_, grain, [&](int64_t begin, int64_t end) { f(static_cast<int>(begin), static_cast<int>(end)); });
  }

  // While gathers are in flight, works in small pieces, between which bytes are sent and received in time.
  template <typename F>
  void cover(int64_t begin, int64_t end, int64_t grain, F f) {
    constexpr int64_t kPieces = 64;
    if (in_flight_ == 0) return begin < end ? f(begin, end) : void();
    const int64_t piece = std::max(grain, (end - begin) / kPieces / grain * grain);
    for (; begin < end; begin += piece) {
      f(begin, std::min(end, begin + piece));
      stage_.gatherer->advance();
    }
  }

  friend class AttentionWork;
  friend class StateBlocks;
  friend struct RowStep;

  Stage& stage_;
  const Band* band_;
  Barrier& barrier_;
  ThreadSpeeds& speeds_;
  const int thread_, threads_;
  int first_ = 0;  // Index of the band's first row in buffers of all rows.
  int rows_ = 0;
  bool alone_ = false;  // Each thread computes all rows of row by row steps.
  uint32_t round_ = 0;
  int joins_ = 0;      // Number of synchronizations after a gather in this run.
  int in_flight_ = 0;  // Number of gathers that this thread has started and not finished.
  Lookahead lookahead_;
};

}  // namespace llamaclust
