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

  // After a job. Two in a row that spent more than half of all time waiting: half the threads do as well, for a while,
  // which is longer each time that trying all threads again fails. One alone may be anything.
  void report(int threads, int64_t wall_ns, int64_t waited_ns) {
    const bool crowded = waited_ns > wall_ns / 2 * threads, again = crowded && crowded_;
    crowded_ = crowded;
    if (again) {
      if (threads == all_) {
        hold_ = std::min(2 * hold_, kLongestHold);
        left_ns_ = hold_ * wall_ns;
      }
      threads_ = std::max(threads / 2, 1);
    } else if (threads == all_) {
      if (!crowded) hold_ = kShortestHold;
      return;
    }
    if (threads < all_ && (left_ns_ -= wall_ns) <= 0) threads_ = all_;
  }

 private:
  static constexpr int64_t kShortestHold = 4, kLongestHold = 512;

  const int all_;
  int threads_;
  bool crowded_ = false;
  int64_t hold_ = kShortestHold;  // how many times as long as the job that was crowded
  int64_t left_ns_ = 0;           // until all threads are tried again
};

}  // namespace llamaclust
