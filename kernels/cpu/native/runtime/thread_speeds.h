// Divides work among threads whose cores differ in speed: performance and efficiency cores, big and little cores, or a
// core that another program also uses. Results do not depend on the division.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace llamaclust {

class ThreadSpeeds {
 public:
  explicit ThreadSpeeds(int threads) : weights_(threads, 1.0), bounds_(threads + 1), times_(threads) { set_bounds(); }

  // Throws std::invalid_argument unless there is one positive speed per thread.
  void set(const std::vector<double>& speeds);

  // Starts a job of `threads` threads. Called before the threads are woken.
  void open(int threads);

  // Returns the first of `count` units that the thread computes. For thread == threads it returns `count`.
  int64_t begin(int64_t count, int thread) const { return count * bounds_[static_cast<size_t>(thread)] / kWhole; }

  // Returns whether threads report their times in this job.
  bool measures() const { return measures_; }
  // Called by a thread: adds the time it took for its share of work that is divided among all threads.
  void add(int thread, int64_t ns) { times_[static_cast<size_t>(thread)].ns += ns; }

  // Called after the job.
  void close();

 private:
  static constexpr int64_t kWhole = int64_t{1} << 20;
  static constexpr int kSamples = 5, kEvery = 4;
  // Smaller differences in speed are noise: threads that read different memory each time find less of it in their
  // caches.
  static constexpr double kNoise = 0.12;
  // Minimum as a fraction of the mean: every thread still gets work and is measured.
  static constexpr double kLeast = 1.0 / 16;

  struct alignas(64) Time {
    int64_t ns = 0;
    std::array<int64_t, kSamples> samples{};
  };

  void set_bounds();
  std::vector<double> measured_weights() const;

  // Weight of each thread: 1 for all, or with a mean of 1 over the threads that take part.
  std::vector<double> weights_;
  std::vector<int64_t> bounds_;  // In units of 1 / kWhole.
  std::vector<Time> times_;
  int threads_ = static_cast<int>(times_.size());
  // Number of jobs since the number of threads changed; number of samples since the last decision.
  int jobs_ = 0, seen_ = 0;
  bool measures_ = false;
};

}  // namespace llamaclust
