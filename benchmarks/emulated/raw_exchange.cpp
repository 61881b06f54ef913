// The baseline for a gather: two processes exchange bytes over a socket and do nothing else.

#include <sys/socket.h>
#include <time.h>

#include <cerrno>
#include <cstdint>

namespace {

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

}  // namespace

// Exchanges `bytes` bytes in both directions `count` times, by polling. Stores the nanoseconds of each exchange in
// `took_ns`. Returns 0 or the number of an error.
extern "C" int raw_exchange(int descriptor, const char* own, char* theirs, int64_t bytes, int count, int64_t* took_ns) {
  for (int i = 0; i < count; i++) {
    const int64_t began = now_ns();
    for (int64_t sent = 0, received = 0; sent < bytes || received < bytes;) {
      if (sent < bytes) {
        const ssize_t done = send(descriptor, own + sent, static_cast<size_t>(bytes - sent), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done < 0 && errno != EAGAIN) return errno;
        if (done > 0) sent += done;
      }
      if (received < bytes) {
        const ssize_t done = recv(descriptor, theirs + received, static_cast<size_t>(bytes - received), MSG_DONTWAIT);
        if (done == 0) return ECONNRESET;
        if (done < 0 && errno != EAGAIN) return errno;
        if (done > 0) received += done;
      }
    }
    took_ns[i] = now_ns() - began;
  }
  return 0;
}
