#include "links/socket.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>
#include <string>
#include <system_error>
#include <utility>

#include "links/waiting.h"

namespace llamaclust {
namespace {

std::string reason_of(int number) { return std::generic_category().message(number); }

// Nothing yet, or the reason for the end of a connection.
size_t nothing_yet(int number) {
  if (number == EAGAIN || number == EWOULDBLOCK || number == EINTR) return 0;
  throw ConnectionEnded("the connection has ended: " + reason_of(number));
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
  const int on = 1;
  if (peer.ss_family != AF_UNIX) setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
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

void Socket::shut_down() const { shutdown(descriptor_, SHUT_RDWR); }

}  // namespace llamaclust
