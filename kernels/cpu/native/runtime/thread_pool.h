// Threads that work on one job together and synchronize at barriers. They spin for some microseconds, then sleep in the
// kernel: two workers on one machine must not keep each other's cores busy.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/core_contention.h"

namespace llamaclust {

// Waits until `word` is no longer `old`, spinning first, then parked; returns nanoseconds if it took more than a
// moment.
int64_t wait_while_equal(const std::atomic<int32_t>& word, int32_t old);

// All callers of arrive() leave it together.
class Barrier {
 public:
  // For that many callers from now on; no thread may be inside.
  void open(int threads) {
    threads_ = threads;
    waited_ns_.store(0, std::memory_order_relaxed);
  }

  // `idle` is called again and again while others are waited for, until it returns false.
  template <typename Idle = bool (*)()>
  void arrive(Idle idle = [] { return false; }) {
    const int threads = threads_;  // before the increment: after it, the next open() may have changed it
    if (threads == 1) return;
    const int32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads) {
      while (phase_.load(std::memory_order_acquire) == phase && idle()) {}
      const int64_t waited = wait_while_equal(phase_, phase);
      if (waited > 0) waited_ns_.fetch_add(waited, std::memory_order_relaxed);
      return;
    }
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  }

  // What all callers together have waited since open(), without short waits.
  int64_t waited_ns() const { return waited_ns_.load(std::memory_order_relaxed); }

 private:
  int threads_ = 1;
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
  alignas(64) std::atomic<int64_t> waited_ns_{0};
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
  const std::unique_ptr<Call[]> calls_;
  std::vector<std::thread> others_;
};

}  // namespace llamaclust
