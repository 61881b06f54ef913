// Gathers over the links to all other members of a group.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "executor/gatherer.h"
#include "links/link.h"

namespace llamaclust {

class Links : public Gatherer {
 public:
  // One link for each member, and none at the place of this one, `own`. A gather ends all links where it takes longer
  // than `deadline_s`.
  Links(int own, std::vector<std::shared_ptr<Link>> links, double deadline_s);

  // What the next gathers belong to: all members must say the same.
  void begin(uint64_t epoch, uint64_t step);

  // The thread polls its links at first, then parks. LinkError, in this gather and all later ones, where a peer sends
  // anything else than its rows, or not all of them in time.
  void gather(const Gathering& gathering) override;

  // Ends all links, also on another thread than one that gathers: that gather fails. No descriptor is left open.
  void close();

 private:
  void exchange(const Gathering& gathering);
  void start(const Gathering& gathering);
  void park(int64_t until_ns) const;
  std::string late() const;
  void end(const std::string& reason);
  void copy_own(const Gathering& gathering) const;

  const int own_;
  const double deadline_s_;
  std::vector<std::shared_ptr<Link>> links_;  // by member
  std::vector<Link*> peers_;                  // the same without a place for this member
  uint64_t epoch_ = 0, step_ = 0;
  std::atomic<bool> closing_{false};
  std::optional<std::string> ended_;  // the first reason
  std::mutex in_use_, ending_;        // `ending_`: for the descriptors, which may not be closed while another thread uses them
};

}  // namespace llamaclust
