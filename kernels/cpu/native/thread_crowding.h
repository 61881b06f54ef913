// How many threads are worth using while other programs want the same cores: a thread that is not running keeps all
// others waiting at the next barrier. Results do not depend on the number.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llamaclust {

class Crowding {
 public:
  explicit Crowding(int threads) : all_(threads), threads_(threads) {}

  // How many should take part in the next job.
  int threads() const { return threads_; }

  // After a job. More than half of all time spent waiting: half the threads do as well, for some jobs, which are more
  // each time that trying all threads again fails.
  void report(int threads, int64_t wall_ns, int64_t waited_ns) {
    const bool crowded = waited_ns > wall_ns / 2 * threads;
    if (crowded) {
      if (threads == all_) {
        hold_ = std::min(2 * hold_, kLongestHold);
        left_ = hold_;
      }
      threads_ = std::max(threads / 2, 1);
    } else if (threads == all_) {
      hold_ = kShortestHold;
    }
    if (threads < all_ && --left_ <= 0) threads_ = all_;
  }

 private:
  static constexpr int kShortestHold = 4, kLongestHold = 512;

  const int all_;
  int threads_;
  int hold_ = kShortestHold;  // jobs until all threads are tried again
  int left_ = 0;
};

}  // namespace llamaclust
