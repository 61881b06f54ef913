#pragma once

#include <cstddef>

namespace llamaclust {

// What so many threads reach of the last cache together, at most.
size_t last_cache_bytes(int threads);

}  // namespace llamaclust
