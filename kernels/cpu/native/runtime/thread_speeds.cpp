#include "runtime/thread_speeds.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <stdexcept>

namespace llamaclust {
namespace {

void make_mean_one(std::span<double> values) {
  double sum = 0;
  for (double value : values) sum += value;
  for (double& value : values) value *= static_cast<double>(values.size()) / sum;
}

bool differ(std::span<const double> values, std::span<const double> others, double share) {
  for (size_t i = 0; i < values.size(); i++)
    if (std::abs(values[i] / others[i] - 1) > share) return true;
  return false;
}

}  // namespace

void ThreadSpeeds::set(const std::vector<double>& speeds) {
  const bool positive = std::all_of(speeds.begin(), speeds.end(), [](double speed) { return speed > 0; });
  if (speeds.size() != weights_.size() || !positive) throw std::invalid_argument("a positive speed for each thread");
  weights_ = speeds;
  seen_ = 0;
  set_bounds();
}

void ThreadSpeeds::open(int threads) {
  if (threads != threads_) {
    threads_ = threads;
    jobs_ = seen_ = 0;
    set_bounds();
  }
  measures_ = threads > 1 && jobs_++ % kEvery == 0;
  if (measures_)
    for (Time& time : times_) time.ns = 0;
}

void ThreadSpeeds::close() {
  if (!measures_) return;
  const auto end = times_.begin() + threads_;
  if (std::any_of(times_.begin(), end, [](const Time& time) { return time.ns <= 0; })) return;
  for (auto time = times_.begin(); time != end; time++) time->samples[static_cast<size_t>(seen_)] = time->ns;
  if (++seen_ < kSamples) return;
  seen_ = 0;
  const std::vector<double> found = measured_weights();
  if (!differ(found, weights_, kNoise)) return;
  std::copy(found.begin(), found.end(), weights_.begin());
  set_bounds();
}

// A thread that took time t for work of weight w has the speed w / t. The median of several samples is used, so that a
// thread that was descheduled for a while does not count as slow.
std::vector<double> ThreadSpeeds::measured_weights() const {
  std::vector<double> found(static_cast<size_t>(threads_));
  for (size_t thread = 0; thread < found.size(); thread++) {
    std::array<int64_t, kSamples> samples = times_[thread].samples;
    std::nth_element(samples.begin(), samples.begin() + kSamples / 2, samples.end());
    found[thread] = weights_[thread] / static_cast<double>(samples[kSamples / 2]);
  }
  make_mean_one(found);
  for (double& weight : found) weight = std::max(weight, kLeast);
  make_mean_one(found);
  const std::vector<double> even(found.size(), 1.0);
  return differ(found, even, kNoise) ? found : even;
}

void ThreadSpeeds::set_bounds() {
  const auto count = static_cast<size_t>(threads_);
  double all = 0, sum = 0;
  for (size_t thread = 0; thread < count; thread++) all += weights_[thread];
  for (size_t thread = 0; thread < count; thread++) {
    bounds_[thread] = static_cast<int64_t>(static_cast<double>(kWhole) * sum / all);
    sum += weights_[thread];
  }
  bounds_[count] = kWhole;
}

}  // namespace llamaclust
