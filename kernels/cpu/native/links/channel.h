// Bytes both ways between two processes, in order: as they are, or encrypted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "links/socket.h"

namespace llamaclust {

// No call blocks. ConnectionEnded where no more bytes can follow.
class Channel {
 public:
  explicit Channel(Socket socket) : socket_(std::move(socket)) {}
  virtual ~Channel() = default;

  // Takes as many bytes as there is room for. `more`: others follow at once.
  virtual size_t write(std::span<const uint8_t> data, bool more) = 0;

  // Whether the system has everything that was written.
  virtual bool flush() = 0;

  // As many bytes as are there; 0 for none yet, and only where the socket has nothing either.
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
