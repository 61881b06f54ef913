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

std::string seconds(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g s", value);
  return text;
}

}  // namespace

std::span<uint8_t> Block::rest(size_t done) const {
  const size_t row_bytes = columns * sizeof(float), row = done / row_bytes, in_row = done % row_bytes;
  return {reinterpret_cast<uint8_t*>(data + row * stride) + in_row, row_bytes - in_row};
}

Channel& Link::channel() const {
  if (!channel_) throw LinkError(peer_ + ": this process has closed the link");
  return *channel_;
}

// What ends a connection names the peer.
template <typename F>
auto Link::named(F call) const {
  try {
    return call(channel());
  } catch (const ConnectionEnded& error) {
    throw LinkError(peer_ + ": " + error.what());
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
      throw LinkError(peer_ + " has not greeted in time: " + std::to_string(got) + " of " +
                      std::to_string(received.size()) + " bytes");
  }
  if (memcmp(received.data(), expected.data(), expected.size()) != 0)
    throw LinkError(peer_ + " greets for another group, place or version");
}

void Link::begin(const FrameHeader& header, std::span<const uint8_t> own, const Block& theirs) {
  sent_header_ = header;
  own_ = own;
  theirs_ = theirs;
  sent_ = received_ = 0;
  flushed_ = false;
}

bool Link::send() {
  if (is_sent()) return false;
  const size_t before = sent_;
  constexpr size_t kHeader = sizeof(FrameHeader);
  if (sent_ < kHeader) sent_ += write(bytes_of(sent_header_).subspan(sent_), true);
  while (sent_ >= kHeader && sent_ < kHeader + own_.size()) {
    const size_t count = write(own_.subspan(sent_ - kHeader), false);
    if (count == 0) break;
    sent_ += count;
  }
  flushed_ = flush();
  return sent_ > before || is_sent();
}

bool Link::receive() {
  const size_t before = received_;
  constexpr size_t kHeader = sizeof(FrameHeader);
  if (received_ < kHeader) {
    received_ += read(bytes_of(received_header_).subspan(received_));
    if (received_ < kHeader) return received_ > before;
    check_header();
  }
  while (!is_received()) {
    const size_t count = read(theirs_.rest(received_ - kHeader));
    if (count == 0) break;
    received_ += count;
  }
  return received_ > before;
}

void Link::check_header() const {
  const FrameHeader &got = received_header_, &own = sent_header_;
  std::string wrong;
  if (got.epoch != own.epoch) wrong = field("epoch", got.epoch, own.epoch);
  else if (got.step != own.step) wrong = field("step", got.step, own.step);
  else if (got.number != own.number) wrong = field("gather", got.number, own.number);
  else if (got.bytes != theirs_.bytes()) wrong = field("bytes", got.bytes, theirs_.bytes());
  if (!wrong.empty()) throw LinkError(peer_ + " has sent " + wrong);
}

std::string Link::missing(double deadline_s) const {
  const bool receives = !is_received();
  const size_t done = receives ? received_ : sent_;
  const size_t all = sizeof(FrameHeader) + (receives ? theirs_.bytes() : own_.size());
  return peer_ + (receives ? " has sent " : " has taken ") + std::to_string(done) + " of " + std::to_string(all) +
         " bytes within " + seconds(deadline_s) + ": step " + std::to_string(sent_header_.step) + ", gather " +
         std::to_string(sent_header_.number);
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
