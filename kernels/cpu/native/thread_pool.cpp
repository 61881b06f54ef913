#include "thread_pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#include "float_mode.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llamaclust {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(40);

// Pauses between two looks at the clock.
constexpr int kSpinsPerLook = 64;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

void wait_while_equal(const std::atomic<int32_t>& word, int32_t old) {
  const auto changed = [&] { return word.load(std::memory_order_acquire) != old; };
  for (int i = 0; i < kSpinsPerLook; i++, pause())
    if (changed()) return;
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  while (std::chrono::steady_clock::now() < end)
    for (int i = 0; i < kSpinsPerLook; i++, pause())
      if (changed()) return;
  word.wait(old, std::memory_order_acquire);
}

ThreadPool::ThreadPool(int threads) : barrier_(threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
  others_.reserve(static_cast<size_t>(threads) - 1);
  try {
    for (int thread = 1; thread < threads; thread++) others_.emplace_back([this, thread] { serve(thread); });
  } catch (const std::system_error&) {
    stop();
    throw std::runtime_error("the system refuses to start " + std::to_string(threads) + " threads");
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  job_ = nullptr;
  jobs_.fetch_add(1, std::memory_order_release);
  jobs_.notify_all();
  for (std::thread& thread : others_) thread.join();
}

void ThreadPool::run(Job& job) {
  const std::lock_guard<std::mutex> lock(one_job_);
  const FloatMode mode;
  if (!others_.empty()) {
    job_ = &job;
    jobs_.fetch_add(1, std::memory_order_release);
    jobs_.notify_all();
  }
  job.work(0);
  barrier_.arrive();
}

void ThreadPool::serve(int thread) {
  const FloatMode mode;
  for (int32_t seen = 0;; seen++) {
    wait_while_equal(jobs_, seen);
    if (job_ == nullptr) return;
    job_->work(thread);
    barrier_.arrive();
  }
}

}  // namespace llamaclust
