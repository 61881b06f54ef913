#include "links/links.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "links/waiting.h"
#include "runtime/core_sharing.h"
#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

constexpr size_t kMostBytes = std::numeric_limits<uint32_t>::max();  // Maximum size of a frame.

LinkError closed() { return {"the links of this group were closed by this process", Fault::Closed, -1}; }

std::span<const uint8_t> own_bytes(const Gathering& gathering) {
  const size_t count = static_cast<size_t>(gathering.rows) * static_cast<size_t>(gathering.own_columns);
  return {reinterpret_cast<const uint8_t*>(gathering.own), count * sizeof(float)};
}

Block block_of(const Gathering& gathering, size_t member) {
  const size_t begin = static_cast<size_t>(gathering.borders[member]);
  const size_t end = static_cast<size_t>(gathering.borders[member + 1]);
  return {reinterpret_cast<uint8_t*>(gathering.whole + begin), static_cast<size_t>(gathering.rows),
          (end - begin) * sizeof(float), static_cast<size_t>(gathering.borders.back()) * sizeof(float)};
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("links: ") + what);
}

// Sets a time to 0 for the lifetime of this object, and to the current time at its end.
class Within {
 public:
  explicit Within(std::atomic<int64_t>& ended_ns) : ended_ns_(ended_ns) { ended_ns_ = 0; }
  ~Within() { ended_ns_ = now_ns(); }

 private:
  std::atomic<int64_t>& ended_ns_;
};

}  // namespace

Links::Links(int own, std::vector<std::shared_ptr<Link>> links, double deadline_s, double answer_s)
    : own_(own), deadline_s_(deadline_s), answer_s_(answer_s), links_(std::move(links)) {
  require(own_ >= 0 && static_cast<size_t>(own_) < links_.size(), "this member has no place");
  require(deadline_s_ > 0 && deadline_s_ < 1e6, "a deadline of more than 0 seconds");
  require(answer_s_ > 0 && answer_s_ < 1e6, "more than 0 seconds for an answer");
  for (size_t member = 0; member < links_.size(); member++) {
    require((links_[member] == nullptr) == (member == static_cast<size_t>(own_)), "one for each other member");
    if (!links_[member]) continue;
    links_[member]->set_place(static_cast<int>(member));
    peers_.push_back(links_[member].get());
  }
  counters_.waited_for_s.resize(links_.size());
}

// Runs one call at a time. The first error ends all links, and later calls throw it again.
template <typename F>
void Links::in_turn(F work) {
  const std::lock_guard locked(in_use_);
  if (ended_) throw LinkError(*ended_);
  const Within call(called_ns_);
  try {
    work();
  } catch (const LinkError& error) {
    end(closing_ ? closed() : cause_of(error));
    throw LinkError(*ended_);
  }
}

void Links::begin(uint64_t epoch, uint64_t step) {
  const std::lock_guard locked(in_use_);
  epoch_ = epoch;
  step_ = step;
}

void Links::send_step(uint64_t epoch, uint64_t step, std::span<const uint8_t> data) {
  require(own_ == 0, "the first member begins steps");
  require(data.size() <= kMostBytes, "a message of less than 4 GiB");
  in_turn([&] {
    epoch_ = epoch;
    step_ = step;
    for (size_t member = 1; member < links_.size(); member++) send(member, kStepNumber, data);
    move([&](size_t member) { return links_[member]->is_sent(); }, deadline_ns());
  });
}

std::vector<uint8_t> Links::receive_step(uint64_t epoch, uint64_t step, size_t most_bytes) {
  require(own_ != 0, "the first member begins steps, the others receive them");
  std::vector<uint8_t> data;
  in_turn([&] {
    epoch_ = epoch;
    step_ = step;
    Link& first = *links_[0];
    first.begin_receiving({epoch, step, kStepNumber, static_cast<uint32_t>(std::min(most_bytes, kMostBytes))});
    move([&](size_t member) { return member != 0 || first.has_received(); }, std::numeric_limits<int64_t>::max());
    const int64_t until_ns = deadline_ns();
    const auto is_received = [&](size_t member) { return member != 0 || first.is_received(); };
    move(is_received, until_ns);
    data.resize(first.announced());
    first.receive_into({data.data(), 1, data.size(), data.size()});
    move(is_received, until_ns);
    const std::lock_guard locked(counting_);
    counters_.received_bytes += sizeof(FrameHeader) + data.size();
  });
  return data;
}

void Links::start(const Gathering& gathering) {
  in_turn([&] {
    begin_frames(gathering);
    for (Link* link : peers_) link->send();
    if (gathering.to < 0 || gathering.to == own_) copy_own(gathering);
  });
}

void Links::advance() {
  const std::lock_guard locked(in_use_);
  if (ended_) return;
  try {
    for (Link* link : peers_) {
      link->send();
      link->receive();
    }
  } catch (const LinkError& error) {
    end(closing_ ? closed() : cause_of(error));
  }
}

void Links::finish(const std::function<void()>& idle) {
  in_turn([&] {
    require(!started_.empty(), "no gather has begun");
    const std::vector<Link::Mark> marks = std::move(started_.front());
    started_.pop_front();
    const int64_t began_ns = now_ns();
    last_.reset();
    move([&](size_t member) { return links_[member]->has_reached(marks[member]); }, deadline_ns(), idle);
    count_gather(now_ns() - began_ns);
  });
}

int64_t Links::deadline_ns() const { return now_ns() + static_cast<int64_t>(deadline_s_ * 1e9); }

// Sends and receives the frames that have begun, until all links are ready.
template <typename F>
void Links::move(F is_ready, int64_t until_ns, const std::function<void()>& idle) {
  const auto look_ns = static_cast<int64_t>(answer_s_ / 4 * 1e9);
  for (int64_t waits_from_ns = now_ns(), looked_ns = waits_from_ns;;) {
    bool moved = false, ready = true;
    for (size_t member = 0; member < links_.size(); member++) {
      Link* link = links_[member].get();
      if (link == nullptr) continue;
      if (!link->is_sent()) moved |= link->send();
      if (!link->is_received()) moved |= link->receive();
      if (is_ready(member)) continue;
      ready = false;
      last_ = member;
    }
    if (ready) return;
    const int64_t now = now_ns();
    if (closing_ || now >= until_ns) throw late(is_ready);
    if (now - looked_ns >= look_ns) {
      check_reached();
      looked_ns = now;
    }
    if (moved) waits_from_ns = now;
    else if (parks_after(now - waits_from_ns, WaitFor::Gather)) park(std::min(until_ns, now + look_ns));
    else idle();
  }
}

// A member without columns sends only a header, which its peers read with a later frame. It shows them which gather the
// member is in, even if the member rejects their frames.
void Links::begin_frames(const Gathering& gathering) {
  require(gathering.borders.size() == links_.size() + 1, "as many members as the gather has");
  const std::span<const uint8_t> own = own_bytes(gathering);
  for (size_t member = 0; member < links_.size(); member++) {
    const size_t bytes = block_of(gathering, member).bytes();
    require(bytes <= kMostBytes, "rows of less than 4 GiB");
    require(member != static_cast<size_t>(own_) || bytes == own.size(), "as many columns as this member has");
  }
  const auto number = static_cast<uint32_t>(gathering.number);
  size_t received_bytes = 0;
  std::vector<Link::Mark> marks(links_.size());
  for (size_t member = 0; member < links_.size(); member++) {
    if (!links_[member]) continue;
    if (gathering.to < 0 || gathering.to == static_cast<int>(member)) send(member, number, own);
    marks[member] = links_[member]->mark();
    if (gathering.to >= 0 && gathering.to != own_) continue;
    const Block theirs = block_of(gathering, member);
    links_[member]->begin_receiving({epoch_, step_, number, static_cast<uint32_t>(theirs.bytes())}, theirs);
    received_bytes += sizeof(FrameHeader) + theirs.bytes();
    if (theirs.bytes() > 0) marks[member] = links_[member]->mark();
  }
  started_.push_back(std::move(marks));
  const std::lock_guard locked(counting_);
  counters_.received_bytes += received_bytes;
}

void Links::send(size_t member, uint32_t number, std::span<const uint8_t> data) {
  links_[member]->begin_sending({epoch_, step_, number, static_cast<uint32_t>(data.size())}, data.data());
  const std::lock_guard locked(counting_);
  counters_.sent_bytes += sizeof(FrameHeader) + data.size();
}

// The wait is attributed to the member that was ready last.
void Links::count_gather(int64_t ns) {
  const std::lock_guard locked(counting_);
  counters_.gathers++;
  if (!last_) return;
  counters_.waited_s += static_cast<double>(ns) * 1e-9;
  counters_.waited_for_s[*last_] += static_cast<double>(ns) * 1e-9;
}

LinkCounters Links::counters() const {
  const std::lock_guard locked(counting_);
  return counters_;
}

double Links::computing_s() const {
  const int64_t called_ns = called_ns_;
  return called_ns == 0 ? 0.0 : static_cast<double>(now_ns() - called_ns) * 1e-9;
}

void Links::copy_own(const Gathering& gathering) const {
  const Block to = block_of(gathering, static_cast<size_t>(own_));
  const std::span<const uint8_t> own = own_bytes(gathering);
  for (size_t row = 0; row < to.rows; row++)
    memcpy(to.data + row * to.stride, own.data() + row * to.row_bytes, to.row_bytes);
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

void Links::check_reached() const {
  for (const Link* link : peers_)
    if (!link->is_complete()) link->check_reached(answer_s_);
}

// The first of the named members is at fault.
template <typename F>
LinkError Links::late(F is_ready) const {
  std::optional<LinkError> first;
  std::string text;
  for (size_t member = 0; member < links_.size(); member++)
    if (links_[member] && !is_ready(member)) {
      const LinkError late = links_[member]->late(deadline_s_);
      text += (text.empty() ? "" : "; ") + std::string(late.what());
      if (!first) first.emplace(late);
    }
  return {text, first->fault, first->place};
}

// A member may have closed its link because another member sent a wrong frame. If that member has sent a wrong frame
// here as well, this is the actual cause.
LinkError Links::cause_of(const LinkError& error) {
  if (error.fault != Fault::Closed) return error;
  for (Link* link : peers_) try {
      while (link->place() != error.place && !link->is_received() && link->receive()) continue;
    } catch (const LinkError& other) {
      if (other.fault == Fault::Wrong) return other;
    }
  return error;
}

// Ends sending, so that peers that wait for this member's rows learn at once that no more will come. They still receive
// what was sent.
void Links::end(const LinkError& reason) {
  const std::lock_guard locked(ending_);
  if (ended_) return;
  ended_.emplace(reason);
  for (const Link* link : peers_) link->socket().finish();
}

void Links::close() {
  closing_ = true;
  {
    const std::lock_guard locked(ending_);
    if (!ended_)
      for (const Link* link : peers_) link->socket().shut_down();
  }
  const std::lock_guard locked(in_use_);  // Waits until the running call has noticed.
  const std::lock_guard also(ending_);
  if (!ended_) ended_.emplace(closed());
  for (Link* link : peers_) link->close();
}

}  // namespace llamaclust
