// Threads that work on one job together and synchronize at barriers. They spin for some microseconds, then sleep in the
// kernel: two workers on one machine must not keep each other's cores busy.
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

// Of a clock that does not go back.
int64_t now_ns();

// Waits until `word` is no longer `old`, spinning first, then parked; returns nanoseconds if it took more than a
// moment. It spins for `spin_ns` at most.
int64_t wait_while_equal(const std::atomic<int32_t>& word, int32_t old, int64_t spin_ns = kShortWaitNs);

// All callers of arrive() leave it together.
class Barrier {
 public:
  // For that many callers from now on; no thread may be inside.
  void open(int threads) {
    threads_ = threads;
    opening_++;
    waited_.store(opening_ << kWaitedBits, std::memory_order_relaxed);
  }

  // `idle` is called again and again while others are waited for, until it returns false. `counts`: what the caller
  // waits here is added to waited_ns(). `spin_ns`: see wait_while_equal().
  template <typename Idle = bool (*)()>
  void arrive(Idle idle = [] { return false; }, bool counts = true, int64_t spin_ns = kShortWaitNs) {
    const int threads = threads_;  // before the increment: after it, the next open() may have changed it
    if (threads == 1) return;
    const uint64_t opening = opening_;
    const int32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads) {
      while (phase_.load(std::memory_order_acquire) == phase && idle()) {}
      const int64_t waited_ns = wait_while_equal(phase_, phase, spin_ns);
      if (waited_ns > 0 && counts) add_waited(opening, static_cast<uint64_t>(waited_ns));
      return;
    }
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  }

  // What all callers together have waited since open(), without short waits and those that are noticed after the next
  // open().
  int64_t waited_ns() const { return static_cast<int64_t>(waited_.load(std::memory_order_relaxed) & kWaitedMask); }

 private:
  static constexpr int kWaitedBits = 44;  // of nanoseconds: five hours
  static constexpr uint64_t kWaitedMask = (uint64_t{1} << kWaitedBits) - 1;

  void add_waited(uint64_t opening, uint64_t ns) {
    uint64_t sum = waited_.load(std::memory_order_relaxed);
    while (sum >> kWaitedBits == (opening << kWaitedBits) >> kWaitedBits &&
           !waited_.compare_exchange_weak(sum, sum + ns, std::memory_order_relaxed)) {}
  }

  int threads_ = 1;
  uint64_t opening_ = 0;  // how often it was opened
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
  alignas(64) std::atomic<uint64_t> waited_{0};  // the opening's number above nanoseconds
};

// How many threads are worth using for jobs that are alike while other programs want the same cores: a thread that is not
// running keeps all others waiting at the next barrier. Found by experiment; results do not depend on the number.
class SimilarJobs {
 public:
  // Where arithmetic is the limit, half the threads do as well only if one is missing for more than half of the time;
  // where memory is, which it is with few rows, much earlier.
  SimilarJobs(int threads, bool few_rows)
      : all_(threads), compared_(few_rows ? 8 : 3), contended_share_(few_rows ? 0.2 : 0.5), threads_(threads) {}

  // How many should take part in the next job.
  int threads() const { return trying_ ? other_ : threads_; }

  // After a job that cost so much, in which threads waited that share of the time for one that was missing. Another
  // number is tried for a few jobs where they wait much or are not all there, less often each time it is in vain.
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
    const bool fewer = contended && (threads_ == all_ || other_ > threads_);  // below all, more and fewer take turns
    other_ = fewer ? std::max(threads_ / 2, 1) : std::min(2 * threads_, all_);
    trying_ = other_ != threads_;
  }

 private:
  static constexpr int kMostCompared = 8, kShortestHold = 16, kLongestHold = 512;
  static constexpr double kFarMore = 1.5, kClearlyLess = 0.97;

  double least() const { return *std::min_element(costs_.begin(), costs_.begin() + seen_); }

  // The mean, to which a hiccup adds no more than twice the least.
  double typical() const {
    double sum = 0;
    for (int i = 0; i < seen_; i++) sum += std::min(costs_[i], 2 * least());
    return sum / seen_;
  }

  // Each job so far cost far more than usual, or they cost as much as the whole trial may.
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
  int threads_, other_ = 0;  // the one that seems best, the one that is tried or was last
  bool trying_ = false;
  std::array<double, kMostCompared> costs_{};  // of the last jobs with the same number of threads
  int seen_ = 0;
  double waited_ = 0, usual_ = 0;
  int hold_ = kShortestHold, held_jobs_ = 0;  // jobs between two trials; how many are left
};

class CoreContention {
 public:
  static constexpr int kFewRows = 8;

  explicit CoreContention(int threads) {
    for (size_t kind = 0; kind < kKinds; kind++) kinds_.emplace_back(threads, kind < size_t{kFewRows});
  }

  // How many should take part in the next job of so many rows.
  int threads(int rows) const { return kinds_[kind_of(rows)].threads(); }

  // After that job. The time before it counts, too: waiting threads keep the caller that submits jobs
  // from the cores. No more of it counts than the job itself took.
  void report(int rows, int64_t began_ns, int64_t ended_ns, int64_t waited_ns) {
    const int64_t wall_ns = std::max<int64_t>(ended_ns - began_ns, 1), others = std::max(threads(rows) - 1, 1);
    const int64_t cost_ns = wall_ns + std::clamp<int64_t>(began_ns - last_ended_ns_, 0, wall_ns);
    last_ended_ns_ = ended_ns;
    const double waited_share = static_cast<double>(waited_ns) / static_cast<double>(wall_ns * others);
    kinds_[kind_of(rows)].report(static_cast<double>(cost_ns) / rows, waited_share);
  }

 private:
  static constexpr size_t kKinds = 16;

  // Few rows by their number, more by its power of two.
  static size_t kind_of(int rows) {
    const auto many = static_cast<size_t>(rows);
    return rows <= kFewRows ? many - 1 : std::min(static_cast<size_t>(kFewRows - 4 + std::bit_width(many)), kKinds - 1);
  }

  std::vector<SimilarJobs> kinds_;
  int64_t last_ended_ns_ = 0;
};

class ThreadPool {
 public:
  // Called at once on every thread that takes part; must not throw.
  using Job = std::function<void(int thread)>;

  // The caller of run() is one of the threads. Where `yields`, fewer take part while others keep the cores busy.
  // std::invalid_argument outside 1 to 1024, std::runtime_error where the system refuses.
  explicit ThreadPool(int threads, bool yields = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }
  // How many take part in the job that is running, all of them unless the pool yields.
  int active_threads() const { return active_threads_; }
  Barrier& barrier() { return barrier_; }
  // Of those in the job that is running.
  ThreadSpeeds& speeds() { return *speeds_; }
  // Of all threads, to begin with: they are measured. std::invalid_argument but for a positive one for each.
  void set_speeds(const std::vector<double>& speeds);

  // The caller is thread 0; jobs of several callers run one by one. Those with as many rows are taken to be alike.
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
  const Job* job_ = nullptr;  // null: a called thread ends
  int active_threads_ = 1;
  std::array<ThreadSpeeds, 2> speeds_of_;  // with few rows, where memory is the limit, and with many
  ThreadSpeeds* speeds_ = speeds_of_.data();
  const std::unique_ptr<Call[]> calls_;
  std::vector<std::thread> others_;
};

}  // namespace llamaclust
