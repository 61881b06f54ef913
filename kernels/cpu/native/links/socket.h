// A connected stream socket that never blocks its caller but in wait().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace llamaclust {

// Why a connection ended: its peer was not ready in time, has closed it, is not reached by packets, or has sent what it
// should not.
enum class Fault { Late, Closed, Unreachable, Wrong };

// Ends a connection; its text has no name of the peer yet.
class ConnectionEnded : public std::runtime_error {
 public:
  explicit ConnectionEnded(const std::string& text, Fault fault = Fault::Closed)
      : std::runtime_error(text), fault(fault) {}
  ConnectionEnded(const ConnectionEnded&) = default;  // no move, as LinkError
  const Fault fault;
};

class Socket {
 public:
  // Takes the descriptor over, whatever it is. ConnectionEnded for one that is no connected socket.
  explicit Socket(int descriptor);
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&&) = delete;
  ~Socket();

  // How many bytes the system took or had: 0 where it has no room, or nothing yet. ConnectionEnded where no more can
  // follow. `more`: other bytes follow at once and should share a packet with these.
  size_t send(std::span<const uint8_t> data, bool more);
  size_t receive(std::span<uint8_t> room);

  // Until one of poll()'s events, or that time of now_ns(): then false.
  bool wait(short events, int64_t until_ns) const;

  // True while the network reaches the other side: its system acknowledges bytes on their way within `answer_s`, probes
  // of an idle connection within 3 s or `answer_s`, and one of three probes where it has no room for bytes, since a
  // process that does not read is reached all the same.
  bool is_reached(double answer_s) const;

  // Nothing more is sent. The other side can still read what was, which closing would take from it.
  void finish() const;

  // Wakes whoever waits here, on any thread; nothing more is sent or received.
  void shut_down() const;

  int descriptor() const { return descriptor_; }

 private:
  void set(int level, int option, int value) const;

  int descriptor_;
};

}  // namespace llamaclust
