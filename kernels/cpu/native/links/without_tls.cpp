// Replaces tls.cpp in a build without OpenSSL.
#include "links/tls.h"

namespace llamaclust {

std::string tls_library() { return ""; }

std::unique_ptr<Channel> open_tls(Socket, const TlsSettings&, int64_t) {
  throw ConnectionEnded("this llamaclust was built without OpenSSL, which links between machines need");
}

}  // namespace llamaclust
