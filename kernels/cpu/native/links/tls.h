// TLS 1.3 between two members with certificates on both sides. Not available in a build without OpenSSL.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "links/channel.h"

namespace llamaclust {

// Certificates and keys are in PEM format.
struct TlsSettings {
  std::string authority;  // The only trusted authority.
  std::string certificate, private_key;
  std::string host;  // The name that the peer's certificate must have.
  bool accepts;      // True if the peer has opened the connection.
};

// Name and version of the library; empty in a build without one.
std::string tls_library();

// Throws ConnectionEnded if the peer's certificate is not the expected one, or if the handshake has not completed by
// `until_ns`.
std::unique_ptr<Channel> open_tls(Socket socket, const TlsSettings& settings, int64_t until_ns);

}  // namespace llamaclust
