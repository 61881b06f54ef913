#include "runtime/cache_size.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace llamaclust {

// The system's own figure may be that of a whole processor, of which a core reaches a slice; Linux reports the slice.
size_t last_cache_bytes(int threads) {
  constexpr size_t kUsual = size_t{32} << 20;
  const long whole = sysconf(_SC_LEVEL3_CACHE_SIZE);  // 0 or less where it is unknown
  const size_t most = whole > 0 ? static_cast<size_t>(whole) : kUsual;
  size_t slice_kib = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> slice_kib;  // as in "32768K"
  return slice_kib > 0 ? std::min(most, (slice_kib << 10) * static_cast<size_t>(threads)) : most;
}

}  // namespace llamaclust
