// Threads that work on one job together and synchronize at barriers. A waiting thread spins for a while and then sleeps
// in the kernel, so that two workers on one machine do not occupy each other's cores.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/core_sharing.h"
#include "runtime/thread_speeds.h"

namespace llamaclust {

// Time of a monotonic clock, in nanoseconds.
int64_t now_ns();

// Waits until `word` differs from `old`: spins, then parks. Returns the nanoseconds waited, or 0 for a short wait.
int64_t wait_while_equal(const std::atomic<int32_t>& word, int32_t old, WaitFor what);

// A barrier: arrive() returns once all participating threads have called it.
class Barrier {
 public:
  // Prepares the barrier for `threads` callers. No thread may be inside arrive().
  void open(int threads) {
    threads_ = threads;
    opening_++;
    waited_.store(opening_ << kWaitedBits, std::memory_order_relaxed);
  }

  // `idle` is called repeatedly while the caller waits, until it returns false. Waits for a thread are added to
  // waited_ns().
  template <typename Idle = bool (*)()>
  void arrive(Idle idle = [] { return false; }, WaitFor what = WaitFor::FewRows) {
    // Read before the increment, because the next open() may change it afterwards.
    const int threads = threads_;
    if (threads == 1) return;
    const uint64_t opening = opening_;
    const int32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads) {
      while (phase_.load(std::memory_order_acquire) == phase && idle()) {}
      const int64_t waited_ns = wait_while_equal(phase_, phase, what);
      if (waited_ns > 0 && what != WaitFor::Gather) add_waited(opening, static_cast<uint64_t>(waited_ns));
      return;
    }
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  }

  // Total nanoseconds that all callers have waited since open(). Excludes short waits, and waits that end only after
  // the next open().
  int64_t waited_ns() const { return static_cast<int64_t>(waited_.load(std::memory_order_relaxed) & kWaitedMask); }

 private:
  static constexpr int kWaitedBits = 44;  // Bits for nanoseconds, which suffice for almost five hours.
  static constexpr uint64_t kWaitedMask = (uint64_t{1} << kWaitedBits) - 1;

  void add_waited(uint64_t opening, uint64_t ns) {
    uint64_t sum = waited_.load(std::memory_order_relaxed);
    while (sum >> kWaitedBits == (opening << kWaitedBits) >> kWaitedBits &&
           !waited_.compare_exchange_weak(sum, sum + ns, std::memory_order_relaxed)) {}
  }

  int threads_ = 1;
  uint64_t opening_ = 0;  // Number of calls of open().
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
  // The number of the opening in the upper bits, nanoseconds in the lower ones.
  alignas(64) std::atomic<uint64_t> waited_{0};
};

// Chooses the number of threads for similar jobs while other programs use the same cores. A thread that is not running
// keeps all others waiting at the next barrier, so fewer threads may be faster. The choice is found by trials; results
// do not depend on it.
class SimilarJobs {
 public:
  // Half the threads are a match for all of them only if a thread is missing for more than half of the time, where
  // arithmetic is the bottleneck. Where memory is (with few rows), they are already if a thread is missing much more
  // rarely.
  SimilarJobs(int threads, bool few_rows)
      : all_(threads), compared_(few_rows ? 8 : 3), contended_share_(few_rows ? 0.2 : 0.5), threads_(threads) {}

  // Number of threads for the next job.
  int threads() const { return trying_ ? other_ : threads_; }

  // Records a job with its cost and the share of its time in which threads waited for a missing one. Starts a trial of
  // another number of threads for a few jobs if threads waited much or if not all of them took part. Each
  // failed trial doubles the number of jobs until the next one.
  void report(double cost, double waited_share) {
    costs_[seen_++] = cost;
    waited_ += waited_share;
    if (trying_ && hopeless()) return end_probe(false);
    if (!trying_ && held_jobs_ > 0) held_jobs_--;
    if (seen_ < compared_) return;
    if (trying_) return end_probe(typical() < kClearlyLess * usual_);
    usual_ = typical();
    const bool contended = waited_ > contended_share_ * compared_;
    forget();
    if (held_jobs_ > 0) return;
    if (threads_ == all_ && !contended) hold_ = kShortestHold;
    // Below the full number, trials of more and of fewer threads alternate.
    const bool fewer = contended && (threads_ == all_ || other_ > threads_);
    other_ = fewer ? std::max(threads_ / 2, 1) : std::min(2 * threads_, all_);
    trying_ = other_ != threads_;
  }

 private:
  static constexpr int kMostCompared = 8, kShortestHold = 16, kLongestHold = 512;
  static constexpr double kFarMore = 1.5, kClearlyLess = 0.97;

  double least() const { return *std::min_element(costs_.begin(), costs_.begin() + seen_); }

  // Returns the mean cost, in which a single slow job counts at most twice the minimum.
  double typical() const {
    double sum = 0;
    for (int i = 0; i < seen_; i++) sum += std::min(costs_[i], 2 * least());
    return sum / seen_;
  }

  // Returns whether a trial can be ended early: each job cost far more than usual, or together they cost as much as the
  // usual jobs of a whole trial.
  bool hopeless() const { return seen_ > 1 && (least() > kFarMore * usual_ || seen_ * typical() > compared_ * usual_); }

  void end_probe(bool pays) {
    if (pays) std::swap(threads_, other_);
    held_jobs_ = hold_ = std::clamp(pays ? hold_ / 4 : 2 * hold_, kShortestHold, kLongestHold);
    trying_ = false;
    forget();
  }

  void forget() {
    seen_ = 0;
    waited_ = 0;
  }

  const int all_, compared_;
  const double contended_share_;
  // The number of threads that seems best; the number on trial, or of the last trial.
  int threads_, other_ = 0;
  bool trying_ = false;
  std::array<double, kMostCompared> costs_{};  // Costs of the last jobs with the same number of threads.
  int seen_ = 0;
  double waited_ = 0, usual_ = 0;
  // Number of jobs between two trials; number of jobs that remain until the next one.
  int hold_ = kShortestHold, held_jobs_ = 0;
};

class CoreContention {
 public:
  static constexpr int kFewRows = 8;

  explicit CoreContention(int threads) {
    for (size_t kind = 0; kind < kKinds; kind++) kinds_.emplace_back(threads, kind < size_t{kFewRows});
  }

  // Number of threads for the next job of `rows` rows.
  int threads(int rows) const { return kinds_[kind_of(rows)].threads(); }

  // Records a finished job. The time since the previous job counts as well, because waiting threads keep the caller
  // that submits jobs from the cores. It counts for no more than the duration of the job itself.
  void report(int rows, int64_t began_ns, int64_t ended_ns, int64_t waited_ns) {
    const int64_t wall_ns = std::max<int64_t>(ended_ns - began_ns, 1), others = std::max(threads(rows) - 1, 1);
    const int64_t cost_ns = wall_ns + std::clamp<int64_t>(began_ns - last_ended_ns_, 0, wall_ns);
    last_ended_ns_ = ended_ns;
    const double waited_share = static_cast<double>(waited_ns) / static_cast<double>(wall_ns * others);
    kinds_[kind_of(rows)].report(static_cast<double>(cost_ns) / rows, waited_share);
  }

 private:
  static constexpr size_t kKinds = 16;

  // Kinds of jobs: one for each number of rows up to kFewRows, then one for each power of two.
  static size_t kind_of(int rows) {
    const auto many = static_cast<size_t>(rows);
    return rows <= kFewRows ? many - 1 : std::min(static_cast<size_t>(kFewRows - 4 + std::bit_width(many)), kKinds - 1);
  }

  std::vector<SimilarJobs> kinds_;
  int64_t last_ended_ns_ = 0;
};

class ThreadPool {
 public:
  // Called concurrently on every participating thread. Must not throw.
  using Job = std::function<void(int thread)>;

  // The caller of run() is one of the threads. If `yields`, fewer threads take part while other programs keep the cores
  // busy. Throws std::invalid_argument unless `threads` is 1 to 1024, std::runtime_error if the system refuses to start
  // a thread.
  explicit ThreadPool(int threads, bool yields = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  // Number of threads that take part in the running job: all, unless the pool yields.
  int active_threads() const { return active_threads_; }
  Barrier& barrier() { return barrier_; }
  // Speeds of the threads in the running job.
  ThreadSpeeds& speeds() { return speeds_; }
  // Sets initial speeds, which measurements replace. Throws std::invalid_argument unless there is one positive speed
  // per thread.
  void set_speeds(const std::vector<double>& speeds);

  // Runs the job with the caller as thread 0. Jobs of several callers run one after another. Jobs with equal `rows` are
  // assumed to be similar.
  void run(const Job& job, int rows = 1);

 private:
  struct alignas(64) Call {
    std::atomic<int32_t> count{0};
  };

  void serve(int thread);
  void work(int thread) noexcept;
  void call(int thread);
  void stop();

  const int threads_;
  const bool yields_;
  std::mutex job_mutex_;
  CoreContention contention_;
  Barrier barrier_;
  const Job* job_ = nullptr;  // Null tells a woken thread to end.
  int active_threads_ = 1;
  ThreadSpeeds speeds_;
  const std::unique_ptr<Call[]> calls_;
  std::vector<std::thread> others_;
};

}  // namespace llamaclust
