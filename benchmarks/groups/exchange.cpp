// Gathers of a group: each member sends its portion of a row to the others over mutual TLS 1.3 and receives theirs.
// A prototype: C functions for ctypes, one connection a pair, all members alike.

#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kDeadlineNs = 60'000'000'000, kTimerNs = 60'000;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

std::string last_error;

void check(bool holds, const std::string& what) {
  if (holds) return;
  const unsigned long number = ERR_peek_last_error();
  throw std::runtime_error(what + (number == 0 ? "" : std::string(": ") + ERR_reason_error_string(number)));
}

struct Header {
  int64_t sent_ns;
  uint32_t number, bytes;
};

struct Peer {
  int member, descriptor;
  SSL* ssl;
  std::vector<uint8_t> received;
};

// A row of which each member computes [borders[member], borders[member + 1]).
struct Row {
  const float* own;
  float* whole;
  std::vector<int> borders;

  size_t bytes(int member) const { return 4 * static_cast<size_t>(borders[member + 1] - borders[member]); }
};

class Group {
 public:
  Group(const char* folder, int member, bool spins) : member_(member), spins_(spins), context_(SSL_CTX_new(TLS_method())) {
    const std::string base = std::string(folder) + "/" + std::to_string(member);
    check(SSL_CTX_set_min_proto_version(context_, TLS1_3_VERSION) == 1, "TLS 1.3");
    check(SSL_CTX_use_certificate_chain_file(context_, (base + ".crt").c_str()) == 1, base + ".crt");
    check(SSL_CTX_use_PrivateKey_file(context_, (base + ".key").c_str(), SSL_FILETYPE_PEM) == 1, base + ".key");
    check(SSL_CTX_load_verify_locations(context_, (std::string(folder) + "/ca.crt").c_str(), nullptr) == 1, "ca.crt");
    SSL_CTX_set_verify(context_, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    SSL_CTX_set_num_tickets(context_, 0);
    SSL_CTX_set_read_ahead(context_, 1);  // several records by one system call
    SSL_CTX_set_default_read_buffer_len(context_, 1 << 17);
    SSL_CTX_set_mode(context_, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    prctl(PR_SET_TIMERSLACK, 1000);
  }

  // The handshake with a member whose certificate has to be for `host`.
  void connect(int descriptor, int member, const char* host, bool accepts) {
    SSL* ssl = SSL_new(context_);
    check(SSL_set1_host(ssl, host) == 1 && SSL_set_fd(ssl, descriptor) == 1, "a connection");
    check((accepts ? SSL_accept(ssl) : SSL_connect(ssl)) == 1, std::string("handshake with ") + host);
    check(fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK) == 0, "a connection that does not wait");
    peers_.push_back({member, descriptor, ssl, {}});
  }

  int add(Row row) {
    rows_.push_back(std::move(row));
    return static_cast<int>(rows_.size()) - 1;
  }

  // Sends and receives; each message counts as received `delay_ns` after it was sent, and later by what all messages of
  // its sender take at `byte_ns`. Returns how long it took.
  int64_t gather(int number, int64_t delay_ns, double byte_ns) {
    const int64_t began = now_ns();
    const Row& row = rows_.at(static_cast<size_t>(number));
    const size_t bytes = row.bytes(member_);
    message_.resize(sizeof(Header) + bytes);
    memcpy(message_.data() + sizeof(Header), row.own, bytes);
    const Header header{now_ns(), static_cast<uint32_t>(number), static_cast<uint32_t>(bytes)};
    memcpy(message_.data(), &header, sizeof header);
    for (Peer& peer : peers_) send(peer, began);
    memcpy(row.whole + row.borders[member_], row.own, bytes);
    for (Peer& peer : peers_) {
      const Header got = receive(peer, row.bytes(peer.member), began);
      check(got.number == header.number, "members are at different rows");
      const double link_ns = byte_ns * static_cast<double>(got.bytes) * static_cast<double>(peers_.size());
      wait_until(got.sent_ns + delay_ns + static_cast<int64_t>(link_ns));
      memcpy(row.whole + row.borders[peer.member], peer.received.data() + sizeof(Header), got.bytes);
    }
    return now_ns() - began;
  }

 private:
  void send(Peer& peer, int64_t began) {
    for (size_t sent = 0; sent < message_.size();) {
      const int done = SSL_write(peer.ssl, message_.data() + sent, static_cast<int>(message_.size() - sent));
      if (done <= 0) wait(peer, done, POLLOUT, began);
      else sent += static_cast<size_t>(done);
    }
  }

  Header receive(Peer& peer, size_t bytes, int64_t began) {
    peer.received.resize(sizeof(Header) + bytes);
    for (size_t got = 0; got < peer.received.size();) {
      const int done = SSL_read(peer.ssl, peer.received.data() + got, static_cast<int>(peer.received.size() - got));
      if (done <= 0) wait(peer, done, POLLIN, began);
      else got += static_cast<size_t>(done);
    }
    Header header;
    memcpy(&header, peer.received.data(), sizeof header);
    check(header.bytes == bytes, "a message of another length");
    return header;
  }

  // Returns where it is worth to try again; a member with a core of its own does not sleep.
  void wait(const Peer& peer, int result, short events, int64_t began) const {
    const int error = SSL_get_error(peer.ssl, result);
    const bool open = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    if (!open || now_ns() - began > kDeadlineNs)
      throw std::runtime_error("member " + std::to_string(peer.member) + (open ? " is silent" : " has closed the link"));
    pollfd waited{peer.descriptor, events, 0};
    if (!spins_) poll(&waited, 1, 1000);
  }

  void wait_until(int64_t due) const {
    const int64_t woken = due - kTimerNs;
    if (!spins_ && woken > now_ns()) {
      const timespec t{woken / 1'000'000'000, woken % 1'000'000'000};
      clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr);
    }
    while (now_ns() < due) {}
  }

  const int member_;
  const bool spins_;
  SSL_CTX* const context_;
  std::vector<Peer> peers_;
  std::vector<Row> rows_;
  std::vector<uint8_t> message_;
};

// -1 for an exception, whose text is the last error.
template <typename F>
int64_t guarded(F f) {
  try {
    return f();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace

extern "C" {

const char* group_error() { return last_error.c_str(); }

void* group_open(const char* folder, int member, int spins) {
  Group* group = nullptr;
  guarded([&] { return group = new Group(folder, member, spins != 0), 0; });
  return group;
}

int64_t group_connect(void* group, int descriptor, int member, const char* host, int accepts) {
  return guarded([&] { return static_cast<Group*>(group)->connect(descriptor, member, host, accepts != 0), 0; });
}

int64_t group_add(void* group, const float* own, float* whole, const int* borders, int members) {
  return guarded([&] {
    return static_cast<Group*>(group)->add({own, whole, {borders, borders + members + 1}});
  });
}

int64_t group_gather(void* group, int row, int64_t delay_ns, double byte_ns) {
  return guarded([&] { return static_cast<Group*>(group)->gather(row, delay_ns, byte_ns); });
}

}  // extern "C"
