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

// Since the links began.
struct LinkCounters {
  int64_t gathers = 0;
  uint64_t sent_bytes = 0, received_bytes = 0;  // with headers, of steps as well
  double waited_s = 0;                          // in gathers
  std::vector<double> waited_for_s;             // the same by member: each wait is for the last one that was ready
};

class Links : public Gatherer {
 public:
  // One link for each member, and none at the place of this one, `own`. A gather ends all links where it takes longer
  // than `deadline_s`, and any call where the network does not bring a member's answers for `answer_s`.
  Links(int own, std::vector<std::shared_ptr<Link>> links, double deadline_s, double answer_s);

  // What the next gathers belong to: all members must say the same.
  void begin(uint64_t epoch, uint64_t step);

  // The first member begins a step and tells all others what to compute in it; they take it within the deadline. For
  // errors of these and of gathers, see start().
  void send_step(uint64_t epoch, uint64_t step, std::span<const uint8_t> data);

  // Another member waits until the first one begins that step, however long it takes; then the deadline counts.
  std::vector<uint8_t> receive_step(uint64_t epoch, uint64_t step, size_t most_bytes);

  // Gathers go on in their order. A thread that waits polls its links at first, then parks. LinkError, in this call and
  // all later ones, where a peer sends anything else than its rows, or not all of them in time.
  void start(const Gathering& gathering) override;
  void advance() override;
  void finish(const std::function<void()>& idle) override;

  // On any thread, at any time.
  LinkCounters counters() const;

  // Seconds since the last call ended: so long, no other member has been waited for. 0 within a call, and before the first.
  // On any thread.
  double computing_s() const;

  // Ends all links, also on another thread than one that gathers or waits: that call fails. No descriptor is left open.
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
  std::vector<std::shared_ptr<Link>> links_;  // by member
  std::vector<Link*> peers_;                  // the same without a place for this member
  uint64_t epoch_ = 0, step_ = 0;
  std::deque<std::vector<Link::Mark>> started_;  // gathers that are not finished: where each link is when they are
  std::optional<size_t> last_;                   // the member that was ready last
  LinkCounters counters_;
  std::atomic<bool> closing_{false};
  std::atomic<int64_t> called_ns_{0};  // the end of the last call; 0 within one
  std::optional<LinkError> ended_;  // the first reason
  std::mutex in_use_, ending_;      // `ending_`: for the descriptors, which may not be closed while another thread uses them
  mutable std::mutex counting_;
};

}  // namespace llamaclust
