#include "runtime/thread_pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#include "runtime/float_mode.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llamaclust {
namespace {

// Number of pauses between two readings of the clock.
constexpr int kSpinsPerLook = 64;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

int64_t wait_while_equal(const std::atomic<int32_t>& word, int32_t old, WaitFor what) {
  const auto spin = [&] {
    for (int i = 0; i < kSpinsPerLook; i++, pause())
      if (word.load(std::memory_order_acquire) != old) return true;
    return false;
  };
  if (spin()) return 0;
  const int64_t start = now_ns();
  while (!spin()) {
    const int64_t waited_ns = now_ns() - start;
    if (parks_after(waited_ns, what)) {
      word.wait(old, std::memory_order_acquire);
      break;
    }
    if (waited_ns >= kLongWaitNs) std::this_thread::yield();
  }
  return now_ns() - start;
}

ThreadPool::ThreadPool(int threads, bool yields)
    : threads_(threads >= 1 && threads <= 1024 ? threads : throw std::invalid_argument("threads must be 1 to 1024")),
      yields_(yields),
      contention_(threads),
      speeds_(threads),
      calls_(std::make_unique<Call[]>(static_cast<size_t>(threads))) {
  others_.reserve(static_cast<size_t>(threads));
  try {
    for (int thread = 1; thread < threads; thread++) others_.emplace_back([this, thread] { serve(thread); });
  } catch (const std::system_error&) {
    stop();
    throw std::runtime_error("the system refuses to start " + std::to_string(threads) + " threads");
  }
}

void ThreadPool::set_speeds(const std::vector<double>& speeds) {
  const std::lock_guard<std::mutex> lock(job_mutex_);
  speeds_.set(speeds);
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  job_ = nullptr;
  for (size_t i = 0; i < others_.size(); i++) call(static_cast<int>(i) + 1);
  for (std::thread& thread : others_) thread.join();
}

void ThreadPool::call(int thread) {
  std::atomic<int32_t>& count = calls_[thread].count;
  count.fetch_add(1, std::memory_order_release);
  count.notify_one();
}

void ThreadPool::work(int thread) noexcept {
  (*job_)(thread);
  barrier_.arrive();
}

void ThreadPool::run(const Job& job, int rows) {
  const std::lock_guard<std::mutex> lock(job_mutex_);
  const FloatMode mode;
  const int64_t start = now_ns();
  job_ = &job;
  active_threads_ = yields_ ? contention_.threads(rows) : threads_;
  barrier_.open(active_threads_);
  speeds_.open(active_threads_);
  for (int thread = 1; thread < active_threads_; thread++) call(thread);
  work(0);
  speeds_.close();
  if (yields_) contention_.report(rows, start, now_ns(), barrier_.waited_ns());
}

void ThreadPool::serve(int thread) {
  const FloatMode mode;
  for (int32_t seen = 0;; seen++) {
    wait_while_equal(calls_[thread].count, seen, WaitFor::FewRows);
    if (job_ == nullptr) return;
    work(thread);
  }
}

}  // namespace llamaclust
