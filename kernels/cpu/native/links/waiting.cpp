#include "links/waiting.h"

#include <ctime>

#include "runtime/thread_pool.h"

namespace llamaclust {

bool wait_for(std::span<pollfd> waited, int64_t until_ns) {
  constexpr int64_t kSecondNs = 1'000'000'000;
  const int64_t left_ns = until_ns - now_ns();
  if (left_ns <= 0) return false;
  const timespec left{left_ns / kSecondNs, left_ns % kSecondNs};
  ppoll(waited.data(), waited.size(), &left, nullptr);
  return true;
}

}  // namespace llamaclust
