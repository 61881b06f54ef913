#include "runtime/cache_size.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace llamaclust {

// sysconf may report the cache of the whole processor although a core reaches only a slice of it. Linux reports the
// slice in sysfs.
size_t last_cache_bytes(int threads) {
  constexpr size_t kUsual = size_t{32} << 20;
  const long whole = sysconf(_SC_LEVEL3_CACHE_SIZE);  // The value is 0 or less if the size is unknown.
  const size_t most = whole > 0 ? static_cast<size_t>(whole) : kUsual;
  size_t slice_kib = 0;
  // The file has a text such as "32768K".
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> slice_kib;
  return slice_kib > 0 ? std::min(most, (slice_kib << 10) * static_cast<size_t>(threads)) : most;
}

}  // namespace llamaclust
