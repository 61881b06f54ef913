// A connection between two members of a group, and the frames that it carries: a header and bytes of known size.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "links/channel.h"

namespace llamaclust {

// The end of a link. The text is a line that names the worker at the other end.
class LinkError : public std::runtime_error {
 public:
  LinkError(const std::string& text, Fault fault, int place)
      : std::runtime_error(text), fault(fault), place(place) {}
  const Fault fault;
  const int place;  // of the member at fault; -1 where that is none, or has no place yet
};

// Precedes the bytes of a frame, little-endian. The receiver knows what each field must be, but for the bytes of a step.
struct FrameHeader {
  uint64_t epoch, step;
  uint32_t number;  // of the gather in its step, or kStepNumber
  uint32_t bytes;   // behind the header
};

// The number of the frame that tells members what to compute in a step.
inline constexpr uint32_t kStepNumber = std::numeric_limits<uint32_t>::max();

// Rows of so many bytes, `stride` bytes from each other.
struct Block {
  uint8_t* data;
  size_t rows, row_bytes, stride;

  size_t bytes() const { return rows * row_bytes; }
  // What follows the first `done` bytes, to the end of its row.
  std::span<uint8_t> rest(size_t done) const;
};

class Link {
 public:
  // Sends `greeting` and waits for the peer's `expected`. LinkError for another one, or none in time.
  Link(std::string peer, std::unique_ptr<Channel> channel, std::span<const uint8_t> greeting,
       std::span<const uint8_t> expected, int64_t until_ns);

  // Sends one and waits for the other one, either of which may be empty. LinkError as in the constructor.
  void greet(std::span<const uint8_t> greeting, std::span<const uint8_t> expected, int64_t until_ns);

  // The peer's, for errors.
  void set_place(int place) { place_ = place; }

  // Begins a frame of `header.bytes` bytes to the peer, which must stay until they are sent.
  void begin_sending(const FrameHeader& header, const uint8_t* data);

  // Begins to receive exactly this frame, whose bytes arrive in `room`, as many as it has.
  void begin_receiving(const FrameHeader& header, const Block& room);

  // Begins to receive the header of a frame of at most `most.bytes`; then there are `announced` bytes to receive.
  void begin_receiving(const FrameHeader& most);
  uint32_t announced() const { return received_header_.bytes; }
  void receive_into(const Block& room);

  // Send and receive what is possible now; false where that is nothing. LinkError for any other frame.
  bool send();
  bool receive();

  bool has_received() const { return received_ > 0; }
  bool is_sent() const { return sent_ == to_send_ && flushed_; }
  bool is_received() const { return received_ == to_receive_; }
  bool is_complete() const { return is_sent() && is_received(); }

  // The peer has not sent or taken its bytes by the deadline.
  LinkError late(double deadline_s) const;

  const Socket& socket() const { return channel().socket(); }

  // Closes the descriptor: nothing more is sent or received.
  void close() { channel_.reset(); }

 private:
  Channel& channel() const;
  template <typename F>
  auto named(F call) const;
  size_t write(std::span<const uint8_t> data, bool more);
  bool flush();
  size_t read(std::span<uint8_t> room);
  void check_header() const;

  const std::string peer_;
  int place_ = -1;
  std::unique_ptr<Channel> channel_;
  FrameHeader sent_header_{}, expected_{}, received_header_{};
  bool exact_ = true;  // else `expected_` has the most bytes
  const uint8_t* own_ = nullptr;
  Block theirs_{};
  size_t sent_ = 0, to_send_ = 0, received_ = 0, to_receive_ = 0;  // bytes with the header
  bool flushed_ = true;
};

}  // namespace llamaclust
