#include "links/socket.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>
#include <string>
#include <system_error>
#include <utility>

#include "links/waiting.h"

namespace llamaclust {
namespace {

constexpr int kProbeS = 1;         // of an idle connection, the system's shortest interval
constexpr double kSilentS = 3.0;  // two probes may be lost
constexpr int kLostProbes = 3;    // of a connection whose other side has no room, at intervals that double from 0.2 s on

std::string reason_of(int number) { return std::generic_category().message(number); }

// The network has lost the peer, or acknowledges nothing.
bool is_unreachable(int number) {
  return number == ETIMEDOUT || number == EHOSTUNREACH || number == ENETUNREACH || number == EHOSTDOWN ||
         number == ENETDOWN;
}

// Nothing yet, or the reason for the end of a connection.
size_t nothing_yet(int number) {
  if (number == EAGAIN || number == EWOULDBLOCK || number == EINTR) return 0;
  throw ConnectionEnded("the connection has ended: " + reason_of(number),
                        is_unreachable(number) ? Fault::Unreachable : Fault::Closed);
}

}  // namespace

Socket::Socket(int descriptor) : descriptor_(descriptor) {
  sockaddr_storage peer;
  socklen_t length = sizeof peer;
  const int flags = fcntl(descriptor, F_GETFL);
  if (getpeername(descriptor, reinterpret_cast<sockaddr*>(&peer), &length) != 0 || flags < 0 ||
      fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) != 0) {
    const std::string reason = reason_of(errno);
    close(descriptor);
    throw ConnectionEnded("no connection: " + reason);
  }
  if (peer.ss_family == AF_UNIX) return;
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, kProbeS);
  set(IPPROTO_TCP, TCP_KEEPINTVL, kProbeS);
}

Socket::Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

Socket::~Socket() {
  if (descriptor_ >= 0) close(descriptor_);
}

size_t Socket::send(std::span<const uint8_t> data, bool more) {
  const ssize_t count = ::send(descriptor_, data.data(), data.size(), MSG_NOSIGNAL | (more ? MSG_MORE : 0));
  return count < 0 ? nothing_yet(errno) : static_cast<size_t>(count);
}

size_t Socket::receive(std::span<uint8_t> room) {
  if (room.empty()) return 0;
  const ssize_t count = recv(descriptor_, room.data(), room.size(), 0);
  if (count == 0) throw ConnectionEnded("the other side has closed the connection");
  return count < 0 ? nothing_yet(errno) : static_cast<size_t>(count);
}

bool Socket::wait(short events, int64_t until_ns) const {
  pollfd waited{descriptor_, events, 0};
  return wait_for({&waited, 1}, until_ns);
}

// Not by TCP_USER_TIMEOUT, which also ends a connection to a process that computes and has not read all bytes yet.
bool Socket::is_reached(double answer_s) const {
  tcp_info info{};
  socklen_t length = sizeof info;
  if (getsockopt(descriptor_, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return true;  // a Unix socket
  int unsent = 0;  // bytes, or not acknowledged
  ioctl(descriptor_, TIOCOUTQ, &unsent);
  if (info.tcpi_unacked == 0 && unsent > 0) return info.tcpi_probes < kLostProbes;
  const double silent_s = std::min(info.tcpi_last_ack_recv, info.tcpi_last_data_recv) * 1e-3;
  return silent_s < (info.tcpi_unacked > 0 ? answer_s : std::max(answer_s, kSilentS));
}

void Socket::set(int level, int option, int value) const { setsockopt(descriptor_, level, option, &value, sizeof value); }

void Socket::finish() const { shutdown(descriptor_, SHUT_WR); }

void Socket::shut_down() const { shutdown(descriptor_, SHUT_RDWR); }

}  // namespace llamaclust
