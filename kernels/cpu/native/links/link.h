// A connection between two members of a group, and the rows that it carries.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>

#include "links/channel.h"

namespace llamaclust {

// The end of a link. The text is a line that names the worker at the other end.
class LinkError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Precedes the rows of each gather, little-endian. The receiver knows what each field must be.
struct FrameHeader {
  uint64_t epoch, step;
  uint32_t number;  // of the gather in its step
  uint32_t bytes;   // of the rows
};

// Columns [begin, begin + columns) of rows with a distance of `stride` columns.
struct Block {
  float* data;
  size_t rows, columns, stride;

  size_t bytes() const { return rows * columns * sizeof(float); }
  // What follows the first `done` bytes, to the end of its row.
  std::span<uint8_t> rest(size_t done) const;
};

class Link {
 public:
  // Sends `greeting` and waits for the peer's `expected`. LinkError for another one, or none in time.
  Link(std::string peer, std::unique_ptr<Channel> channel, std::span<const uint8_t> greeting,
       std::span<const uint8_t> expected, int64_t until_ns);

  // Begins a gather: `own` is sent, and the peer's rows arrive in `theirs`. Both must stay until it is complete.
  void begin(const FrameHeader& header, std::span<const uint8_t> own, const Block& theirs);

  // Send and receive what is possible now; false where that is nothing. LinkError for what is no part of the gather.
  bool send();
  bool receive();

  bool is_sent() const { return sent_ == sizeof sent_header_ + own_.size() && flushed_; }
  bool is_received() const { return received_ == sizeof received_header_ + theirs_.bytes(); }
  bool is_complete() const { return is_sent() && is_received(); }

  // A line on what the peer has not sent or taken by the deadline.
  std::string missing(double deadline_s) const;

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
  void greet(std::span<const uint8_t> greeting, std::span<const uint8_t> expected, int64_t until_ns);

  const std::string peer_;
  std::unique_ptr<Channel> channel_;
  FrameHeader sent_header_{}, received_header_{};
  std::span<const uint8_t> own_;
  Block theirs_{};
  size_t sent_ = 0, received_ = 0;  // bytes of header and rows
  bool flushed_ = true;
};

}  // namespace llamaclust
