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

constexpr int kProbeS = 1;        // Seconds between probes of an idle connection; the system's minimum.
constexpr double kSilentS = 3.0;  // Seconds; two probes may be lost.
// Unanswered probes of a peer that has no room for bytes. Their intervals double, starting at 0.2 s.
constexpr int kLostProbes = 3;

std::string reason_of(int number) { return std::generic_category().message(number); }

// Returns whether the error means that the network does not reach the peer, or that nothing is acknowledged.
bool is_unreachable(int number) {
  return number == ETIMEDOUT || number == EHOSTUNREACH || number == ENETUNREACH || number == EHOSTDOWN ||
         number == ENETDOWN;
}

// Returns 0 if the error means that no bytes are available yet. Throws ConnectionEnded for any other error.
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

// TCP_USER_TIMEOUT is not used: it also ends a connection to a process that computes and has not yet read all bytes.
bool Socket::is_reached(double answer_s) const {
  tcp_info info{};
  socklen_t length = sizeof info;
  if (getsockopt(descriptor_, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return true;  // A Unix socket.
  int unsent = 0;  // Bytes that are not sent or not acknowledged.
  ioctl(descriptor_, TIOCOUTQ, &unsent);
  if (info.tcpi_unacked == 0 && unsent > 0) return info.tcpi_probes < kLostProbes;
  const double silent_s = std::min(info.tcpi_last_ack_recv, info.tcpi_last_data_recv) * 1e-3;
  return silent_s < (info.tcpi_unacked > 0 ? answer_s : std::max(answer_s, kSilentS));
}

void Socket::set(int level, int option, int value) const { setsockopt(descriptor_, level, option, &value, sizeof value); }

void Socket::finish() const { shutdown(descriptor_, SHUT_WR); }

void Socket::shut_down() const { shutdown(descriptor_, SHUT_RDWR); }

}  // namespace llamaclust
