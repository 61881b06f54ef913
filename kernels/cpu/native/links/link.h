// A connection between two members of a group, and the frames that it carries: a header and bytes of known size.
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

// The end of a link. The text is a line that names the worker at the other end.
class LinkError : public std::runtime_error {
 public:
  LinkError(const std::string& text, Fault fault, int place)
      : std::runtime_error(text), fault(fault), place(place) {}
  LinkError(const LinkError&) = default;  // no move: that of std::runtime_error needs a libstdc++ of GCC 9 or later
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
  int place() const { return place_; }

  // A frame of `header.bytes` bytes is to be sent next, behind others; they must stay until then.
  void begin_sending(const FrameHeader& header, const uint8_t* data);

  // Exactly this frame is to come next, behind others; its bytes arrive in `room`, as many as it has.
  void begin_receiving(const FrameHeader& header, const Block& room);

  // The header of a frame of at most `most.bytes` is to come next; then `announced` bytes for receive_into().
  void begin_receiving(const FrameHeader& most);
  uint32_t announced() const { return received_header_.bytes; }
  void receive_into(const Block& room);

  // Send and receive what is possible now; false where that is nothing. LinkError for any other frame.
  bool send();
  bool receive();

  bool has_received() const { return received_ > 0 || is_received(); }
  bool is_sent() const { return outgoing_.empty() && flushed_; }
  bool is_received() const { return incoming_.empty(); }
  bool is_complete() const { return is_sent() && is_received(); }

  // How many frames have begun each way; later, whether all of these are through.
  struct Mark {
    uint64_t sent, received;
  };
  Mark mark() const { return begun_; }
  bool has_reached(const Mark& mark) const {
    return begun_.sent - outgoing_.size() >= mark.sent && begun_.received - incoming_.size() >= mark.received &&
           (flushed_ || !outgoing_.empty());
  }

  // The peer has not sent or taken its bytes by the deadline.
  LinkError late(double deadline_s) const;

  // LinkError where the network does not reach the peer any more; see Socket.
  void check_reached(double answer_s) const;

  const Socket& socket() const { return channel().socket(); }

  // Closes the descriptor: nothing more is sent or received.
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
    bool is_exact;  // else `expected` has the most bytes
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
  size_t sent_ = 0, received_ = 0;  // bytes of the first of these, with its header
  Mark begun_{0, 0};
  FrameHeader sent_header_{}, received_header_{};  // the last ones
  bool flushed_ = true;
};

}  // namespace llamaclust
