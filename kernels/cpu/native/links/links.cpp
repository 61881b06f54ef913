#include "links/links.h"

#include <sched.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "links/waiting.h"
#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

// A thread that waits keeps its core at first, then gives it to others between two looks, and is parked in the end: it comes
// back some 10 us late from there on an idle core, and later from a deep sleep.
constexpr int64_t kKeepsCoreNs = 40'000, kPollNs = 200'000;
constexpr const char* kClosed = "the links of this group were closed by this process";

std::span<const uint8_t> own_bytes(const Gathering& gathering) {
  const size_t count = static_cast<size_t>(gathering.rows) * static_cast<size_t>(gathering.own_columns);
  return {reinterpret_cast<const uint8_t*>(gathering.own), count * sizeof(float)};
}

Block block_of(const Gathering& gathering, size_t member) {
  const int begin = gathering.borders[member], end = gathering.borders[member + 1];
  return {gathering.whole + begin, static_cast<size_t>(gathering.rows), static_cast<size_t>(end - begin),
          static_cast<size_t>(gathering.borders.back())};
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("links: ") + what);
}

}  // namespace

Links::Links(int own, std::vector<std::shared_ptr<Link>> links, double deadline_s)
    : own_(own), deadline_s_(deadline_s), links_(std::move(links)) {
  require(own_ >= 0 && static_cast<size_t>(own_) < links_.size(), "this member has no place");
  require(deadline_s_ > 0 && deadline_s_ < 1e6, "a deadline of more than 0 seconds");
  for (size_t member = 0; member < links_.size(); member++) {
    require((links_[member] == nullptr) == (member == static_cast<size_t>(own_)), "one for each other member");
    if (links_[member]) peers_.push_back(links_[member].get());
  }
}

void Links::begin(uint64_t epoch, uint64_t step) {
  const std::lock_guard locked(in_use_);
  epoch_ = epoch;
  step_ = step;
}

void Links::gather(const Gathering& gathering) {
  const std::lock_guard locked(in_use_);
  if (ended_) throw LinkError(*ended_);
  try {
    exchange(gathering);
  } catch (const LinkError& error) {
    end(closing_ ? kClosed : error.what());
    throw LinkError(*ended_);
  }
}

void Links::exchange(const Gathering& gathering) {
  start(gathering);
  const int64_t until_ns = now_ns() + static_cast<int64_t>(deadline_s_ * 1e9);
  for (Link* link : peers_) link->send();
  copy_own(gathering);
  for (int64_t waits_from_ns = now_ns();;) {
    bool moved = false, complete = true;
    for (Link* link : peers_) {
      moved |= link->send();
      if (!link->is_received()) moved |= link->receive();
      complete &= link->is_complete();
    }
    if (complete) return;
    const int64_t now = now_ns();
    if (closing_ || now >= until_ns) throw LinkError(late());
    if (moved) waits_from_ns = now;
    else if (now - waits_from_ns >= kPollNs) park(until_ns);
    else if (now - waits_from_ns >= kKeepsCoreNs) sched_yield();
  }
}

void Links::start(const Gathering& gathering) {
  require(gathering.borders.size() == links_.size() + 1, "as many members as the gather has");
  const std::span<const uint8_t> own = own_bytes(gathering);
  require(own.size() == block_of(gathering, static_cast<size_t>(own_)).bytes(), "as many columns as this member has");
  for (size_t member = 0; member < links_.size(); member++) {
    if (!links_[member]) continue;
    const Block theirs = block_of(gathering, member);
    require(std::max(own.size(), theirs.bytes()) <= std::numeric_limits<uint32_t>::max(), "rows of less than 4 GiB");
    const auto number = static_cast<uint32_t>(gathering.number), bytes = static_cast<uint32_t>(own.size());
    links_[member]->begin({epoch_, step_, number, bytes}, own, theirs);
  }
}

void Links::copy_own(const Gathering& gathering) const {
  const Block to = block_of(gathering, static_cast<size_t>(own_));
  for (size_t row = 0; row < to.rows; row++)
    memcpy(to.data + row * to.stride, gathering.own + row * to.columns, to.columns * sizeof(float));
}

void Links::park(int64_t until_ns) const {
  std::vector<pollfd> waited;
  for (const Link* link : peers_)
    if (!link->is_complete()) {
      const int events = (link->is_received() ? 0 : POLLIN) | (link->is_sent() ? 0 : POLLOUT);
      waited.push_back({link->socket().descriptor(), static_cast<short>(events), 0});
    }
  wait_for(waited, until_ns);
}

std::string Links::late() const {
  std::string text;
  for (const Link* link : peers_)
    if (!link->is_complete()) text += (text.empty() ? "" : "; ") + link->missing(deadline_s_);
  return text;
}

// Peers that wait for this member's rows learn at once that none will come.
void Links::end(const std::string& reason) {
  const std::lock_guard locked(ending_);
  if (!ended_) ended_ = reason;
  for (Link* link : peers_) link->close();
}

void Links::close() {
  closing_ = true;
  {
    const std::lock_guard locked(ending_);
    if (!ended_)
      for (const Link* link : peers_) link->socket().shut_down();
  }
  const std::lock_guard locked(in_use_);  // once a gather has noticed
  end(kClosed);
}

}  // namespace llamaclust
