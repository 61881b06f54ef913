// A bidirectional byte stream between two processes, plain or encrypted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "links/socket.h"

namespace llamaclust {

// No call blocks. Throws ConnectionEnded if no more bytes can follow.
class Channel {
 public:
  explicit Channel(Socket socket) : socket_(std::move(socket)) {}
  virtual ~Channel() = default;

  // Writes as many bytes as there is room for. `more` says that other bytes follow immediately.
  virtual size_t write(std::span<const uint8_t> data, bool more) = 0;

  // Returns whether the system has accepted everything that was written.
  virtual bool flush() = 0;

  // Reads the available bytes. Returns 0 if there are none yet, in the channel and in the socket.
  virtual size_t read(std::span<uint8_t> room) = 0;

  const Socket& socket() const { return socket_; }

 protected:
  Socket socket_;
};

class PlainChannel : public Channel {
 public:
  using Channel::Channel;
  size_t write(std::span<const uint8_t> data, bool more) override { return socket_.send(data, more); }
  bool flush() override { return true; }
  size_t read(std::span<uint8_t> room) override { return socket_.receive(room); }
};

}  // namespace llamaclust
