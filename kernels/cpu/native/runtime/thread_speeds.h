// How work is divided over threads whose cores differ in speed: performance and efficiency cores, big and little ones, or a
// core that another program shares. Results do not depend on it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace llamaclust {

class ThreadSpeeds {
 public:
  explicit ThreadSpeeds(int threads) : weights_(threads, 1.0), bounds_(threads + 1), times_(threads) { set_bounds(); }

  // std::invalid_argument but for a positive one for each thread.
  void set(const std::vector<double>& speeds);

  // That many take part in the next job. Before their threads are called.
  void open(int threads);

  // Where the part of a thread begins, of `count` units for all of them; thread `threads` begins at `count`.
  int64_t begin(int64_t count, int thread) const { return count * bounds_[static_cast<size_t>(thread)] / kWhole; }

  // Whether threads are to report in this job.
  bool measures() const { return measures_; }
  // By a thread: what parts of work that all threads have parts of took it.
  void add(int thread, int64_t ns) { times_[static_cast<size_t>(thread)].ns += ns; }

  // After the job.
  void close();

 private:
  static constexpr int64_t kWhole = int64_t{1} << 20;
  static constexpr int kSamples = 5, kEvery = 4;
  // Differences of less are noise: threads that read other memory each time find less of it in their caches.
  static constexpr double kNoise = 0.12;
  static constexpr double kLeast = 1.0 / 16;  // of the mean: every thread keeps being measured

  struct alignas(64) Time {
    int64_t ns = 0;
    std::array<int64_t, kSamples> samples{};
  };

  void set_bounds();
  std::vector<double> measured_weights() const;

  std::vector<double> weights_;  // of each thread; all 1, or 1 in the mean of those that take part
  std::vector<int64_t> bounds_;  // in parts of kWhole
  std::vector<Time> times_;
  int threads_ = static_cast<int>(times_.size());
  int jobs_ = 0, seen_ = 0;  // since another number took part; samples since the last decision
  bool measures_ = false;
};

}  // namespace llamaclust
