#include "links/link.h"

#include <poll.h>

#include <bit>
#include <cstdio>
#include <cstring>
#include <vector>

namespace llamaclust {
namespace {

static_assert(std::endian::native == std::endian::little && sizeof(FrameHeader) == 24);

std::span<uint8_t> bytes_of(FrameHeader& header) { return {reinterpret_cast<uint8_t*>(&header), sizeof header}; }

std::string field(const char* name, uint64_t got, uint64_t expected) {
  return std::string(name) + " " + std::to_string(got) + " where " + std::to_string(expected) + " is expected";
}

std::string name_of(uint32_t number) {
  return number == kStepNumber ? "the message of the step" : "gather " + std::to_string(number);
}

std::string number_field(uint32_t got, uint32_t expected) {
  if (got != kStepNumber && expected != kStepNumber) return field("gather", got, expected);
  return name_of(got) + " where " + name_of(expected) + " is expected";
}

std::string seconds(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g s", value);
  return text;
}

}  // namespace

std::span<uint8_t> Block::rest(size_t done) const {
  const size_t row = done / row_bytes, in_row = done % row_bytes;
  return {data + row * stride + in_row, row_bytes - in_row};
}

Channel& Link::channel() const {
  if (!channel_) throw LinkError(peer_ + ": this process has closed the link", Fault::Closed, -1);
  return *channel_;
}

// Adds the name of the peer to the error that ends a connection.
template <typename F>
auto Link::named(F call) const {
  try {
    return call(channel());
  } catch (const ConnectionEnded& error) {
    throw LinkError(peer_ + ": " + error.what(), error.fault, place_);
  }
}

Link::Link(std::string peer, std::unique_ptr<Channel> channel, std::span<const uint8_t> greeting,
           std::span<const uint8_t> expected, int64_t until_ns)
    : peer_(std::move(peer)), channel_(std::move(channel)) {
  greet(greeting, expected, until_ns);
}

void Link::greet(std::span<const uint8_t> greeting, std::span<const uint8_t> expected, int64_t until_ns) {
  std::vector<uint8_t> received(expected.size());
  size_t sent = 0, got = 0;
  bool flushed = false;
  while (sent < greeting.size() || !flushed || got < received.size()) {
    const size_t wrote = sent < greeting.size() ? write(greeting.subspan(sent), false) : 0;
    const size_t came = got < received.size() ? read(std::span(received).subspan(got)) : 0;
    sent += wrote;
    got += came;
    flushed = flush();
    const bool unsent = sent < greeting.size() || !flushed;
    const auto events = static_cast<short>((got < received.size() ? POLLIN : 0) | (unsent ? POLLOUT : 0));
    if (events != 0 && wrote + came == 0 && !socket().wait(events, until_ns))
      throw LinkError(peer_ + " did not send its greeting in time: received " + std::to_string(got) + " of " +
                          std::to_string(received.size()) + " bytes",
                      Fault::Late, place_);
  }
  if (memcmp(received.data(), expected.data(), expected.size()) != 0)
    throw LinkError(peer_ + " belongs to another group or place, or has another version", Fault::Wrong, place_);
}

void Link::begin_sending(const FrameHeader& header, const uint8_t* data) {
  outgoing_.push_back({header, data});
  begun_.sent++;
  flushed_ = false;
}

void Link::begin_receiving(const FrameHeader& header, const Block& room) {
  incoming_.push_back({header, room, true});
  begun_.received++;
}

void Link::begin_receiving(const FrameHeader& most) {
  incoming_.push_back({most, {}, false});
  begun_.received++;
}

void Link::receive_into(const Block& room) {
  if (room.bytes() == 0) return;
  incoming_.push_front({received_header_, room, true});
  begun_.received++;
  received_ = sizeof(FrameHeader);
}

bool Link::send() {
  if (is_sent()) return false;
  bool moved = false;
  while (!outgoing_.empty() && send_first()) moved = true;
  flushed_ = flush() && outgoing_.empty();
  return moved || flushed_;
}

// Sends as much of the first frame as there is room for. Returns false if that is nothing.
bool Link::send_first() {
  Outgoing& frame = outgoing_.front();
  const size_t before = sent_, all = frame.bytes();
  constexpr size_t kHeader = sizeof(FrameHeader);
  if (sent_ < kHeader) sent_ += write(bytes_of(frame.header).subspan(sent_), all > kHeader);
  while (sent_ >= kHeader && sent_ < all) {
    const size_t count = write({frame.data + sent_ - kHeader, all - sent_}, false);
    if (count == 0) break;
    sent_ += count;
  }
  const bool moved = sent_ > before;
  if (sent_ == all) {
    sent_header_ = frame.header;
    outgoing_.pop_front();
    sent_ = 0;
  }
  return moved;
}

bool Link::receive() {
  bool moved = false;
  while (!incoming_.empty() && receive_first()) moved = true;
  return moved;
}

// Receives as much of the first frame as is available. Returns false if that is nothing.
bool Link::receive_first() {
  const Incoming& frame = incoming_.front();
  const size_t before = received_, all = frame.bytes();
  constexpr size_t kHeader = sizeof(FrameHeader);
  if (received_ < kHeader) {
    received_ += read(bytes_of(received_header_).subspan(received_));
    if (received_ < kHeader) return received_ > before;
    check_header();
  }
  while (received_ < all) {
    const size_t count = read(frame.room.rest(received_ - kHeader));
    if (count == 0) break;
    received_ += count;
  }
  const bool moved = received_ > before;
  if (received_ == all) {
    incoming_.pop_front();
    received_ = 0;
  }
  return moved;
}

void Link::check_header() const {
  const FrameHeader &got = received_header_, &expected = incoming_.front().expected;
  std::string wrong;
  if (got.epoch != expected.epoch) wrong = field("epoch", got.epoch, expected.epoch);
  else if (got.step != expected.step) wrong = field("step", got.step, expected.step);
  else if (got.number != expected.number) wrong = number_field(got.number, expected.number);
  else if (incoming_.front().is_exact && got.bytes != expected.bytes) wrong = field("bytes", got.bytes, expected.bytes);
  else if (got.bytes > expected.bytes)
    wrong = "bytes " + std::to_string(got.bytes) + " where at most " + std::to_string(expected.bytes) + " are expected";
  if (!wrong.empty()) throw LinkError(peer_ + " has sent " + wrong, Fault::Wrong, place_);
}

LinkError Link::late(double deadline_s) const {
  const bool receives = !incoming_.empty();
  const Outgoing unsent = outgoing_.empty() ? Outgoing{sent_header_, nullptr} : outgoing_.front();
  const FrameHeader& header = receives ? incoming_.front().expected : unsent.header;
  const size_t all = receives ? incoming_.front().bytes() : unsent.bytes();
  const size_t done = receives ? received_ : outgoing_.empty() ? all : sent_;
  const std::string text = peer_ + (receives ? " has sent " : " has taken ") + std::to_string(done) + " of " +
                           std::to_string(all) + " bytes within " + seconds(deadline_s) + ": step " +
                           std::to_string(header.step) + ", " + name_of(header.number);
  return {text, Fault::Late, place_};
}

void Link::check_reached(double answer_s) const {
  if (!socket().is_reached(answer_s))
    throw LinkError(peer_ + " is unreachable: the network returns no answer", Fault::Unreachable, place_);
}

size_t Link::write(std::span<const uint8_t> data, bool more) {
  return named([&](Channel& channel) { return channel.write(data, more); });
}

bool Link::flush() {
  return named([](Channel& channel) { return channel.flush(); });
}

size_t Link::read(std::span<uint8_t> room) {
  return named([&](Channel& channel) { return channel.read(room); });
}

}  // namespace llamaclust
