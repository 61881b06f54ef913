// Threads that work on one job together and meet at barriers. They spin for some microseconds, then sleep in the kernel:
// two workers on one machine must not burn each other's cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace llamaclust {

// Waits until `word` is no longer `old`: spinning first, then parked.
void wait_while_equal(const std::atomic<int32_t>& word, int32_t old);

// All `threads` callers of arrive() leave it together.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void arrive() {
    if (threads_ == 1) return;
    const int32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < threads_) return wait_while_equal(phase_, phase);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
};

// A job runs on every thread of the pool at once; it must not throw.
class ThreadPool {
 public:
  class Job {
   public:
    virtual void work(int thread) noexcept = 0;

   protected:
    ~Job() = default;
  };

  explicit ThreadPool(int threads);  // the caller of run() is one of them; std::invalid_argument outside 1..1024
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(others_.size()) + 1; }
  Barrier& barrier() { return barrier_; }

  // Calls job.work(thread) once on every thread, the caller being thread 0; jobs of several callers run one by one.
  void run(Job& job);

 private:
  void serve(int thread);
  void stop();

  std::mutex one_job_;
  Barrier barrier_;
  Job* job_ = nullptr;  // null asks the threads to end
  alignas(64) std::atomic<int32_t> jobs_{0};
  std::vector<std::thread> others_;
};

}  // namespace llamaclust
