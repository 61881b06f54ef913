// A connected stream socket. No call but wait() blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace llamaclust {

// Causes of the end of a connection: the peer was not ready in time, has closed it, is not reachable by packets, or has
// sent something wrong.
enum class Fault { Late, Closed, Unreachable, Wrong };

// Ends a connection. Its text does not yet name the peer.
class ConnectionEnded : public std::runtime_error {
 public:
  explicit ConnectionEnded(const std::string& text, Fault fault = Fault::Closed)
      : std::runtime_error(text), fault(fault) {}
  ConnectionEnded(const ConnectionEnded&) = default;  // No move constructor, as in LinkError.
  const Fault fault;
};

class Socket {
 public:
  // Takes ownership of the descriptor, also if it throws. Throws ConnectionEnded if it is not a connected socket.
  explicit Socket(int descriptor);
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&&) = delete;
  ~Socket();

  // Return how many bytes the system took or delivered: 0 if it has no room, or no bytes yet. Throw ConnectionEnded if
  // no more can follow. `more` says that other bytes follow immediately and should share a packet with these.
  size_t send(std::span<const uint8_t> data, bool more);
  size_t receive(std::span<uint8_t> room);

  // Waits for one of the events of poll(). Returns false at time `until_ns` of now_ns().
  bool wait(short events, int64_t until_ns) const;

  // Returns whether the network reaches the peer. Its system must acknowledge sent bytes within `answer_s`, probes of
  // an idle connection within 3 s or `answer_s` (whichever is longer), and one of three probes if it has no room for
  // bytes. The last case is not a fault: a process that does not read is still reachable.
  bool is_reached(double answer_s) const;

  // Ends sending. The peer can still read what was sent, which closing the socket might discard.
  void finish() const;

  // Wakes every thread that waits for this socket. Nothing more is sent or received.
  void shut_down() const;

  int descriptor() const { return descriptor_; }

 private:
  void set(int level, int option, int value) const;

  int descriptor_;
};

}  // namespace llamaclust
