// TLS 1.3 between two members, both of which show a certificate; absent where there was no OpenSSL to build with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "links/channel.h"

namespace llamaclust {

// Certificates and keys are PEM.
struct TlsSettings {
  std::string authority;  // the only one that is trusted
  std::string certificate, private_key;
  std::string host;  // the name that the peer's certificate must have
  bool accepts;      // the peer has opened the connection
};

// The library with its version; empty where there is none.
std::string tls_library();

// ConnectionEnded where the peer is not the one that is meant, or the handshake has not ended by then.
std::unique_ptr<Channel> open_tls(Socket socket, const TlsSettings& settings, int64_t until_ns);

}  // namespace llamaclust
