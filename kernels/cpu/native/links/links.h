// Steps and gathers over the links to all other members of a group.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "executor/gatherer.h"
#include "links/link.h"

namespace llamaclust {

// Totals since the links were created.
struct LinkCounters {
  int64_t gathers = 0;
  uint64_t sent_bytes = 0, received_bytes = 0;  // With headers, including those of steps.
  double waited_s = 0;                          // Seconds of waiting in gathers.
  // The same seconds by member: each wait is attributed to the member that was ready last.
  std::vector<double> waited_for_s;
};

class Links : public Gatherer {
 public:
  // `links` has one link for each member, and null at this member's place, `own`. A gather that takes longer than
  // `deadline_s` ends all links. So does any call if the network has not acknowledged data to a member for `answer_s`.
  Links(int own, std::vector<std::shared_ptr<Link>> links, double deadline_s, double answer_s);

  // Sets the epoch and step of the next gathers, which must be the same at all members.
  void begin(uint64_t epoch, uint64_t step);

  // Called by the first member: begins a step and tells all others what to compute in it. They must take the message
  // within the deadline. Errors are those of start().
  void send_step(uint64_t epoch, uint64_t step, std::span<const uint8_t> data);

  // Called by the other members: waits without limit until the first member begins this step. From then on the deadline
  // counts.
  std::vector<uint8_t> receive_step(uint64_t epoch, uint64_t step, size_t most_bytes);

  // Gathers complete in order. A waiting thread polls its links at first and then parks. This call and all later ones
  // throw LinkError if a peer sends anything but its rows, or does not send all of them in time.
  void start(const Gathering& gathering) override;
  void advance() override;
  void finish(const std::function<void()>& idle) override;

  // Callable on any thread, at any time.
  LinkCounters counters() const;

  // Seconds since the last call ended, during which this member has waited for no other one. 0 within a call, and
  // before the first one. Callable on any thread.
  double computing_s() const;

  // Ends all links and closes their descriptors. Another thread that gathers or waits gets an error.
  void close();

 private:
  template <typename F>
  void in_turn(F work);
  template <typename F>
  void move(F is_ready, int64_t until_ns, const std::function<void()>& idle = [] {});
  int64_t deadline_ns() const;
  void begin_frames(const Gathering& gathering);
  void send(size_t member, uint32_t number, std::span<const uint8_t> data);
  void park(int64_t until_ns) const;
  template <typename F>
  LinkError late(F is_ready) const;
  void check_reached() const;
  LinkError cause_of(const LinkError& error);
  void end(const LinkError& reason);
  void copy_own(const Gathering& gathering) const;
  void count_gather(int64_t ns);

  const int own_;
  const double deadline_s_, answer_s_;
  std::vector<std::shared_ptr<Link>> links_;  // One per member.
  std::vector<Link*> peers_;                  // The same links without the null at this member's place.
  uint64_t epoch_ = 0, step_ = 0;
  // For each unfinished gather, the mark at which each link has completed it.
  std::deque<std::vector<Link::Mark>> started_;
  std::optional<size_t> last_;  // The member that was ready last.
  LinkCounters counters_;
  std::atomic<bool> closing_{false};
  std::atomic<int64_t> called_ns_{0};  // Time when the last call ended; 0 within a call.
  std::optional<LinkError> ended_;     // The first error.
  // `ending_` guards the descriptors, which must not be closed while another thread uses them.
  std::mutex in_use_, ending_;
  mutable std::mutex counting_;
};

}  // namespace llamaclust
