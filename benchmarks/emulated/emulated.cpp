// A library that is preloaded into workers to emulate a slower network between the members of a group, and slower
// members. It replaces functions of the C library where the object $EMULATED_CALLER calls them for a TCP connection. All
// other calls pass through.
//
// The file $EMULATED_LINK has a delay and a rate, which are 0 at first and may change at any time. Received bytes become
// readable after the delay, counted from their arrival in the kernel (SO_TIMESTAMPNS), and not faster than the rate.
// Until then, recv() finds nothing and ppoll() waits. This library reads the bytes from the kernel at each call, so the
// TCP window does not close.
//
// If $EMULATED_SPEED is below 1, a thread waits before it sends, in proportion to the time that it computed since it last
// used a link.

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

namespace {

constexpr int64_t kSecondNs = 1'000'000'000;
constexpr int kMostDescriptors = 4096;
constexpr size_t kPieceBytes = 1 << 16, kTakenBytes = 1 << 22;  // by one system call; by one look

struct LinkSettings {  // the file's contents
  std::atomic<int64_t> delay_ns;
  std::atomic<double> byte_ns;
};

template <typename F>
F* real(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

int64_t time_of(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return t.tv_sec * kSecondNs + t.tv_nsec;
}

int64_t now_ns() { return time_of(CLOCK_REALTIME); }  // the clock of the kernel's stamps

LinkSettings& settings() {
  static LinkSettings* const found = [] {
    const char* path = getenv("EMULATED_LINK");
    const int file = path == nullptr ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    void* at = file < 0 ? MAP_FAILED : mmap(nullptr, sizeof(LinkSettings), PROT_READ, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) {
      fprintf(stderr, "EMULATED_LINK: %s\n", strerror(errno));
      abort();
    }
    return static_cast<LinkSettings*>(at);
  }();
  return *found;
}

double speed() {
  static const double found = getenv("EMULATED_SPEED") == nullptr ? 1.0 : atof(getenv("EMULATED_SPEED"));
  return found;
}

// Returns whether the code at this address belongs to the object whose calls are emulated.
bool is_meant(void* code) {
  static thread_local void* last = nullptr;
  static thread_local bool found = false;
  if (code == last) return found;
  Dl_info info;
  const char* wanted = getenv("EMULATED_CALLER");
  last = code;
  found = wanted != nullptr && dladdr(code, &info) != 0 && info.dli_fname != nullptr && strstr(info.dli_fname, wanted);
  return found;
}

std::atomic<int64_t> receiver_free_ns{0};  // when the network has delivered all bytes so far

// The bytes that a connection has received and its reader has not read.
class Arrivals {
 public:
  explicit Arrivals(int descriptor) : descriptor_(descriptor) {
    const int on = 1;
    setsockopt(descriptor, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
  }

  // Behaves like recv() of a descriptor that does not block.
  ssize_t give(void* room, size_t bytes) {
    static const auto really = real<ssize_t(int, void*, size_t, int)>("recv");
    const std::lock_guard locked(mutex_);
    if (pieces_.empty() && error_ < 0 && settings().delay_ns == 0 && settings().byte_ns == 0)
      return really(descriptor_, room, bytes, MSG_DONTWAIT);
    take();
    size_t given = 0;
    while (given < bytes && is_due()) {
      Piece& piece = pieces_.front();
      const size_t count = std::min(bytes - given, piece.bytes.size() - piece.given);
      memcpy(static_cast<uint8_t*>(room) + given, piece.bytes.data() + piece.given, count);
      given += count;
      if ((piece.given += count) == piece.bytes.size()) pieces_.pop_front();
    }
    if (given > 0) return static_cast<ssize_t>(given);
    if (pieces_.empty() && error_ == 0) return 0;
    errno = pieces_.empty() && error_ > 0 ? error_ : EAGAIN;
    return -1;
  }

  // Returns when bytes become readable: 0 if they are readable now, -1 if none have arrived.
  int64_t ready_ns() {
    const std::lock_guard locked(mutex_);
    take();
    if (pieces_.empty()) return error_ < 0 ? -1 : 0;
    return is_due() ? 0 : pieces_.front().due_ns;
  }

 private:
  struct Piece {
    int64_t due_ns;
    std::vector<uint8_t> bytes;
    size_t given;
  };

  bool is_due() const { return !pieces_.empty() && pieces_.front().due_ns <= now_ns(); }

  void take() {
    static thread_local std::vector<uint8_t> room(kPieceBytes);
    for (size_t taken = 0; error_ < 0 && taken < kTakenBytes;) {
      alignas(cmsghdr) char control[CMSG_SPACE(sizeof(timespec))];
      iovec part{room.data(), room.size()};
      msghdr message{};
      message.msg_iov = &part;
      message.msg_iovlen = 1;
      message.msg_control = control;
      message.msg_controllen = sizeof control;
      const ssize_t count = recvmsg(descriptor_, &message, MSG_DONTWAIT);
      if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (count <= 0) {
        error_ = count == 0 ? 0 : errno;
        return;
      }
      taken += static_cast<size_t>(count);
      pieces_.push_back({due_ns(arrival_ns(message), count), {room.begin(), room.begin() + count}, 0});
    }
  }

  static int64_t arrival_ns(msghdr& message) {
    for (cmsghdr* each = CMSG_FIRSTHDR(&message); each != nullptr; each = CMSG_NXTHDR(&message, each))
      if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == SCM_TIMESTAMPNS) {
        timespec t;
        memcpy(&t, CMSG_DATA(each), sizeof t);
        return t.tv_sec * kSecondNs + t.tv_nsec;
      }
    return now_ns();
  }

  static int64_t due_ns(int64_t arrival_ns, ssize_t bytes) {
    const auto takes_ns = static_cast<int64_t>(settings().byte_ns * static_cast<double>(bytes));
    int64_t before_ns = receiver_free_ns, free_ns;
    do free_ns = std::max(before_ns, arrival_ns) + takes_ns;
    while (!receiver_free_ns.compare_exchange_weak(before_ns, free_ns));
    return free_ns + settings().delay_ns;
  }

  const int descriptor_;
  std::mutex mutex_;
  std::deque<Piece> pieces_;
  int error_ = -1;  // the connection's, 0 after its end; -1: it goes on
};

using Slot = std::atomic<std::shared_ptr<Arrivals>>;

// Returns the slot of a descriptor, or null for a descriptor out of range. Slots are never freed.
Slot* slot_of(int descriptor) {
  static Slot* const slots = new Slot[kMostDescriptors];
  return descriptor < 0 || descriptor >= kMostDescriptors ? nullptr : slots + descriptor;
}

bool is_tcp(int descriptor) {
  int domain = 0;
  socklen_t length = sizeof domain;
  return getsockopt(descriptor, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain != AF_UNIX;
}

// Returns the arrivals of a TCP connection, which are created at its first use, or null for other descriptors.
std::shared_ptr<Arrivals> arrivals_of(int descriptor) {
  Slot* const slot = slot_of(descriptor);
  std::shared_ptr<Arrivals> found = slot == nullptr ? nullptr : slot->load();
  if (!found && slot != nullptr && is_tcp(descriptor)) slot->store(found = std::make_shared<Arrivals>(descriptor));
  return found;
}

thread_local int64_t looked_ns = 0;  // processor time of the thread when it last looked at a link

void look() {
  if (speed() < 1) looked_ns = time_of(CLOCK_THREAD_CPUTIME_ID);
}

void slow_down() {
  if (speed() >= 1 || looked_ns == 0) return;
  const int64_t computed_ns = time_of(CLOCK_THREAD_CPUTIME_ID) - looked_ns;
  const int64_t until_ns = now_ns() + static_cast<int64_t>(static_cast<double>(computed_ns) * (1 / speed() - 1));
  while (now_ns() < until_ns) {
  }
}

// Waits as ppoll() does, also for emulated arrivals. `until_ns` is the deadline, or -1 for none.
int wait(pollfd* waited, nfds_t count, int64_t until_ns) {
  static const auto really = real<int(pollfd*, nfds_t, const timespec*, const sigset_t*)>("ppoll");
  static thread_local const bool precise = prctl(PR_SET_TIMERSLACK, 1) == 0;  // else waits end 50 us late
  static_cast<void>(precise);
  for (;;) {
    int64_t next_ns = until_ns;
    bool is_ready = false;
    std::vector<pollfd> asked(waited, waited + count);
    for (pollfd& each : asked) {
      const auto found = (each.events & POLLIN) != 0 ? arrivals_of(each.fd) : nullptr;
      const int64_t ready_ns = found ? found->ready_ns() : -1;
      is_ready |= ready_ns == 0;
      if (ready_ns > 0) next_ns = next_ns < 0 ? ready_ns : std::min(next_ns, ready_ns);
    }
    const int64_t left_ns = is_ready ? 0 : std::max<int64_t>(0, next_ns - now_ns());
    const timespec left{left_ns / kSecondNs, left_ns % kSecondNs};
    const int found = really(asked.data(), count, next_ns < 0 && !is_ready ? nullptr : &left, nullptr);
    const int error = errno;
    bool is_done = found < 0 || (until_ns >= 0 && now_ns() >= until_ns);
    int ready = 0;
    for (nfds_t i = 0; i < count; i++) {
      const auto own = (waited[i].events & POLLIN) != 0 ? arrivals_of(waited[i].fd) : nullptr;
      short events = found < 0 ? short{0} : asked[i].revents;
      if (own) events = static_cast<short>((events & ~POLLIN) | (own->ready_ns() == 0 ? POLLIN : 0));
      waited[i].revents = events;
      ready += events != 0;
    }
    errno = error;
    if (ready > 0 || is_done) return found < 0 ? found : ready;
  }
}

}  // namespace

extern "C" {

ssize_t recv(int descriptor, void* room, size_t bytes, int flags) {
  static const auto really = real<ssize_t(int, void*, size_t, int)>("recv");
  const auto found = is_meant(__builtin_return_address(0)) ? arrivals_of(descriptor) : nullptr;
  const ssize_t count = found ? found->give(room, bytes) : really(descriptor, room, bytes, flags);
  if (found) look();
  return count;
}

ssize_t send(int descriptor, const void* data, size_t bytes, int flags) {
  static const auto really = real<ssize_t(int, const void*, size_t, int)>("send");
  if (!is_meant(__builtin_return_address(0))) return really(descriptor, data, bytes, flags);
  slow_down();
  const ssize_t count = really(descriptor, data, bytes, flags);
  look();
  return count;
}

int ppoll(pollfd* waited, nfds_t count, const timespec* left, const sigset_t* signals) {
  static const auto really = real<int(pollfd*, nfds_t, const timespec*, const sigset_t*)>("ppoll");
  if (!is_meant(__builtin_return_address(0))) return really(waited, count, left, signals);
  const int result = wait(waited, count, left == nullptr ? -1 : now_ns() + left->tv_sec * kSecondNs + left->tv_nsec);
  look();
  return result;
}

int close(int descriptor) {
  static const auto really = real<int(int)>("close");
  if (Slot* const slot = slot_of(descriptor); slot != nullptr && slot->load()) slot->store(nullptr);
  return really(descriptor);
}

}  // extern "C"
