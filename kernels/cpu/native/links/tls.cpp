#include "links/tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

namespace llamaclust {
namespace {

constexpr size_t kRecordBytes = 16384, kMostUnsent = 1 << 18;
constexpr size_t kReadAhead = 1 << 17;  // Reads several records in one system call.
// A key is renewed after this number of records. AES-GCM is safe for 2^24.5, but OpenSSL does not count them.
constexpr int kRecordsOfKey = 1 << 16;
constexpr int kMostRenewals = 8;

template <typename T, void (*free)(T*)>
struct Freed {
  void operator()(T* object) const { free(object); }
};
template <typename T, void (*free)(T*)>
using Owned = std::unique_ptr<T, Freed<T, free>>;
using Context = Owned<SSL_CTX, SSL_CTX_free>;
using Session = Owned<SSL, SSL_free>;
using Certificate = Owned<X509, X509_free>;
using Key = Owned<EVP_PKEY, EVP_PKEY_free>;

std::string reason() {
  const unsigned long number = ERR_peek_last_error();
  const char* text = number == 0 ? nullptr : ERR_reason_error_string(number);
  ERR_clear_error();
  return text == nullptr ? "unknown" : text;
}

void check(bool holds, const char* what) {
  if (!holds) throw ConnectionEnded(std::string(what) + ": " + reason(), Fault::Wrong);
}

template <typename T, typename Read>
T* from_pem(const std::string& text, Read read) {
  BIO* bio = BIO_new_mem_buf(text.data(), static_cast<int>(text.size()));
  T* found = bio == nullptr ? nullptr : read(bio, nullptr, nullptr, nullptr);
  BIO_free(bio);
  return found;
}

bool has_aes_instructions() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("aes");
#elif defined(__aarch64__)
  return (getauxval(AT_HWCAP) & HWCAP_AES) != 0;
#else
  return false;
#endif
}

// Without AES instructions, AES takes several times as long as ChaCha20. A side without them puts ChaCha20 first, and
// its order decides.
const char* cipher_suites() {
  return has_aes_instructions() ? "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256"
                                : "TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256";
}

// Uses no system-wide settings, does not resume sessions, and accepts no intermediate certificates.
Context context_of(const TlsSettings& settings) {
  OPENSSL_init_ssl(OPENSSL_INIT_NO_LOAD_CONFIG | OPENSSL_INIT_NO_ATEXIT, nullptr);
  ERR_clear_error();
  Context context(SSL_CTX_new(TLS_method()));
  SSL_CTX* raw = context.get();
  check(raw != nullptr && SSL_CTX_set_min_proto_version(raw, TLS1_3_VERSION) == 1, "TLS 1.3");
  check(SSL_CTX_set_ciphersuites(raw, cipher_suites()) == 1, "TLS ciphers");
  if (!has_aes_instructions()) SSL_CTX_set_options(raw, SSL_OP_CIPHER_SERVER_PREFERENCE);
  const Certificate authority(from_pem<X509>(settings.authority, PEM_read_bio_X509));
  const Certificate certificate(from_pem<X509>(settings.certificate, PEM_read_bio_X509));
  const Key key(from_pem<EVP_PKEY>(settings.private_key, PEM_read_bio_PrivateKey));
  check(authority && X509_STORE_add_cert(SSL_CTX_get_cert_store(raw), authority.get()) == 1, "the authority");
  check(certificate && SSL_CTX_use_certificate(raw, certificate.get()) == 1, "this worker's certificate");
  check(key && SSL_CTX_use_PrivateKey(raw, key.get()) == 1, "this worker's key");
  SSL_CTX_set_verify(raw, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  SSL_CTX_set_verify_depth(raw, 0);
  SSL_CTX_set_num_tickets(raw, 0);
  SSL_CTX_set_session_cache_mode(raw, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_read_ahead(raw, 1);
  SSL_CTX_set_default_read_buffer_len(raw, kReadAhead);
  SSL_CTX_set_mode(raw, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  return context;
}

class TlsChannel : public Channel {
 public:
  TlsChannel(Socket socket, const TlsSettings& settings)
      : Channel(std::move(socket)), context_(context_of(settings)), session_(SSL_new(context_.get())) {
    SSL* raw = session_.get();
    BIO* bio = BIO_new(method());
    check(raw != nullptr && bio != nullptr, "TLS");
    BIO_set_data(bio, this);
    BIO_set_init(bio, 1);
    SSL_set_bio(raw, bio, bio);
    SSL_set_msg_callback_arg(raw, this);
    SSL_set_msg_callback(raw, [](int sent, int, int type, const void* data, size_t bytes, SSL*, void* channel) {
      if (sent != 0 || type != SSL3_RT_HANDSHAKE || bytes == 0) return;
      const uint8_t message = *static_cast<const uint8_t*>(data);
      if (message == SSL3_MT_KEY_UPDATE || message == SSL3_MT_NEWSESSION_TICKET)
        static_cast<TlsChannel*>(channel)->renewals_++;
    });
    SSL_set_hostflags(raw, X509_CHECK_FLAG_NO_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT);
    check(SSL_set1_host(raw, settings.host.c_str()) == 1, "the peer's name");
    settings.accepts ? SSL_set_accept_state(raw) : SSL_set_connect_state(raw);
  }

  void shake_hands(int64_t until_ns) {
    for (;;) {
      const bool done = call([&] { return SSL_do_handshake(session_.get()); }) > 0;
      const bool flushed = flush();
      if (done && flushed) return;
      const int events = (done ? 0 : POLLIN) | (flushed ? 0 : POLLOUT);
      if (!socket_.wait(static_cast<short>(events), until_ns))
        throw ConnectionEnded("no TLS handshake in time", Fault::Late);
    }
  }

  // Encrypts records into memory first, so that all records of a frame go out in one system call. A piece with `more`
  // is held back and shares a record with the bytes that follow.
  size_t write(std::span<const uint8_t> data, bool more) override {
    if (unsent() >= kMostUnsent && !flush()) return 0;
    const std::span<const uint8_t> piece = data.first(std::min(data.size(), kRecordBytes - held_.size()));
    if (!more && held_.empty()) {
      encrypt(piece);
      return piece.size();
    }
    held_.insert(held_.end(), piece.begin(), piece.end());
    if (!more || held_.size() == kRecordBytes) {
      encrypt(held_);
      held_.clear();
    }
    return piece.size();
  }

  bool flush() override {
    while (unsent() > 0) {
      const size_t count = socket_.send(std::span(out_).subspan(sent_), false);
      if (count == 0) break;
      sent_ += count;
    }
    if (unsent() == 0 || sent_ > kMostUnsent) {
      out_.erase(out_.begin(), out_.begin() + static_cast<std::ptrdiff_t>(sent_));
      sent_ = 0;
    }
    return out_.empty();
  }

  size_t read(std::span<uint8_t> room) override {
    const int bytes = static_cast<int>(std::min(room.size(), kReadAhead));
    const int count = call([&] { return SSL_read(session_.get(), room.data(), bytes); });
    if (count > 0) renewals_ = 0;
    return static_cast<size_t>(count);
  }

 private:
  size_t unsent() const { return out_.size() - sent_; }

  // Encrypts one record.
  void encrypt(std::span<const uint8_t> data) {
    if (records_++ % kRecordsOfKey == kRecordsOfKey - 1)
      check(SSL_key_update(session_.get(), SSL_KEY_UPDATE_NOT_REQUESTED) == 1, "another key of TLS");
    const int bytes = static_cast<int>(data.size());
    check(call([&] { return SSL_write(session_.get(), data.data(), bytes); }) == bytes, "a record of TLS");
  }

  // Returns the result of an OpenSSL function, or 0 if it needs more bytes from the socket or room in it.
  template <typename F>
  int call(F function) {
    ERR_clear_error();
    const int result = function();
    if (result > 0) return result;
    if (broken_) throw ConnectionEnded(*broken_);
    const int error = SSL_get_error(session_.get(), result);
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE) return 0;
    std::string text = "TLS: " + (error == SSL_ERROR_ZERO_RETURN ? "the other side has ended it" : reason());
    if (const long refused = SSL_get_verify_result(session_.get()); refused != X509_V_OK)
      text += std::string(", ") + X509_verify_cert_error_string(refused);
    try {
      flush();  // Sends the TLS alert.
    // The peer has gone; `text` already says why this side ends.
    } catch (const ConnectionEnded&) {
    }
    throw ConnectionEnded(text, error == SSL_ERROR_ZERO_RETURN ? Fault::Closed : Fault::Wrong);
  }

  // The BIO through which OpenSSL reads and writes. Exceptions must not pass through it.
  static BIO_METHOD* method() {
    static BIO_METHOD* const made = [] {
      BIO_METHOD* found = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "link");
      BIO_meth_set_write(found, [](BIO* bio, const char* data, int bytes) { return of(bio).take(data, bytes); });
      BIO_meth_set_read(found, [](BIO* bio, char* data, int bytes) { return of(bio).give(bio, data, bytes); });
      BIO_meth_set_ctrl(found, [](BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1L : 0L; });
      return found;
    }();
    return made;
  }

  static TlsChannel& of(BIO* bio) { return *static_cast<TlsChannel*>(BIO_get_data(bio)); }

  int take(const char* data, int bytes) {
    if (unsent() > 2 * kMostUnsent) {  // The peer requests new keys repeatedly.
      broken_.emplace("the other side does not read", Fault::Wrong);
      return -1;
    }
    out_.insert(out_.end(), data, data + bytes);
    return bytes;
  }

  int give(BIO* bio, char* data, int bytes) {
    BIO_clear_retry_flags(bio);
    if (renewals_ > kMostRenewals) {  // OpenSSL would go on reading regardless of the caller's deadline.
      broken_.emplace("the other side sends new keys or tickets and no bytes", Fault::Wrong);
      return -1;
    }
    try {
      const size_t count = socket_.receive({reinterpret_cast<uint8_t*>(data), static_cast<size_t>(bytes)});
      if (count > 0) return static_cast<int>(count);
      BIO_set_retry_read(bio);
    } catch (const ConnectionEnded& error) {
      broken_.emplace(error);
    }
    return -1;
  }

  const Context context_;
  const Session session_;
  std::vector<uint8_t> held_;  // Not yet encrypted; later bytes share their record.
  std::vector<uint8_t> out_;   // Encrypted; the first `sent_` bytes are with the system.
  size_t sent_ = 0;
  uint64_t records_ = 0;  // Number of records encrypted so far.
  // Number of new keys and tickets since the peer last sent data.
  int renewals_ = 0;
  std::optional<ConnectionEnded> broken_;  // Set once the socket takes and gives no more bytes.
};

}  // namespace

std::string tls_library() { return OpenSSL_version(OPENSSL_VERSION); }

std::unique_ptr<Channel> open_tls(Socket socket, const TlsSettings& settings, int64_t until_ns) {
  auto channel = std::make_unique<TlsChannel>(std::move(socket), settings);
  channel->shake_hands(until_ns);
  return channel;
}

}  // namespace llamaclust
