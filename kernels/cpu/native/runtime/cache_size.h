#pragma once

#include <cstddef>

namespace llamaclust {

// Maximum number of bytes of the last-level cache that `threads` threads can use together.
size_t last_cache_bytes(int threads);

}  // namespace llamaclust
