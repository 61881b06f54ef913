// A connection between two members of a group. It carries frames: a header and a known number of bytes.
#pragma once

#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "links/channel.h"

namespace llamaclust {

// A link has ended. The text is one line that names the worker at the other end.
class LinkError : public std::runtime_error {
 public:
  LinkError(const std::string& text, Fault fault, int place)
      : std::runtime_error(text), fault(fault), place(place) {}
  // No move constructor: that of std::runtime_error needs a libstdc++ of GCC 9 or later.
  LinkError(const LinkError&) = default;
  const Fault fault;
  // Place of the member at fault; -1 if no member is, or if it has no place yet.
  const int place;
};

// Precedes the bytes of a frame, in little-endian order. The receiver checks every field against the expected value,
// except the number of bytes of a step.
struct FrameHeader {
  uint64_t epoch, step;
  uint32_t number;  // Number of the gather in its step, or kStepNumber.
  uint32_t bytes;   // Number of bytes that follow the header.
};

// Number of the frame with which the first member tells the others what to compute in a step.
inline constexpr uint32_t kStepNumber = std::numeric_limits<uint32_t>::max();

// Rows of `row_bytes` bytes, at a distance of `stride` bytes.
struct Block {
  uint8_t* data;
  size_t rows, row_bytes, stride;

  size_t bytes() const { return rows * row_bytes; }
  // Returns the memory after the first `done` bytes, up to the end of that row.
  std::span<uint8_t> rest(size_t done) const;
};

class Link {
 public:
  // Sends `greeting` and waits for the peer to send `expected`. Throws LinkError if the peer sends anything else, or
  // nothing by `until_ns`.
  Link(std::string peer, std::unique_ptr<Channel> channel, std::span<const uint8_t> greeting,
       std::span<const uint8_t> expected, int64_t until_ns);

  // Exchanges greetings again; either may be empty. Throws LinkError as the constructor does.
  void greet(std::span<const uint8_t> greeting, std::span<const uint8_t> expected, int64_t until_ns);

  // The peer's place in the group, for errors.
  void set_place(int place) { place_ = place; }
  int place() const { return place_; }

  // Queues a frame of `header.bytes` bytes for sending. The data must stay valid until it is sent.
  void begin_sending(const FrameHeader& header, const uint8_t* data);

  // Queues the expectation of exactly this frame. Its bytes go to `room`, which has the size of the frame.
  void begin_receiving(const FrameHeader& header, const Block& room);

  // Queues the expectation of a frame with at most `most.bytes` bytes. Once its header is received, announced() is its
  // size, and receive_into() provides the room.
  void begin_receiving(const FrameHeader& most);
  uint32_t announced() const { return received_header_.bytes; }
  void receive_into(const Block& room);

  // Send or receive what is possible now; return false if that is nothing. Throw LinkError if another frame arrives.
  bool send();
  bool receive();

  bool has_received() const { return received_ > 0 || is_received(); }
  bool is_sent() const { return outgoing_.empty() && flushed_; }
  bool is_received() const { return incoming_.empty(); }
  bool is_complete() const { return is_sent() && is_received(); }

  // Number of frames begun in each direction. has_reached() later tells whether all of them are complete.
  struct Mark {
    uint64_t sent, received;
  };
  Mark mark() const { return begun_; }
  bool has_reached(const Mark& mark) const {
    return begun_.sent - outgoing_.size() >= mark.sent && begun_.received - incoming_.size() >= mark.received &&
           (flushed_ || !outgoing_.empty());
  }

  // Returns the error that the peer has not sent or taken its bytes by the deadline.
  LinkError late(double deadline_s) const;

  // Throws LinkError if the network no longer reaches the peer (Socket::is_reached).
  void check_reached(double answer_s) const;

  const Socket& socket() const { return channel().socket(); }

  // Closes the descriptor. Nothing more is sent or received.
  void close() { channel_.reset(); }

 private:
  struct Outgoing {
    FrameHeader header;
    const uint8_t* data;
    size_t bytes() const { return sizeof header + header.bytes; }
  };
  struct Incoming {
    FrameHeader expected;
    Block room;
    bool is_exact;  // If false, expected.bytes is a maximum.
    size_t bytes() const { return sizeof expected + room.bytes(); }
  };

  Channel& channel() const;
  template <typename F>
  auto named(F call) const;
  size_t write(std::span<const uint8_t> data, bool more);
  bool flush();
  size_t read(std::span<uint8_t> room);
  bool send_first();
  bool receive_first();
  void check_header() const;

  const std::string peer_;
  int place_ = -1;
  std::unique_ptr<Channel> channel_;
  std::deque<Outgoing> outgoing_;
  std::deque<Incoming> incoming_;
  size_t sent_ = 0, received_ = 0;  // Bytes of the first frame in each queue, including the header.
  Mark begun_{0, 0};
  FrameHeader sent_header_{}, received_header_{};  // Headers of the most recent frames.
  bool flushed_ = true;
};

}  // namespace llamaclust
