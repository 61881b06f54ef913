#include "runtime/core_sharing.h"

#include <sys/resource.h>

#include "runtime/thread_pool.h"

namespace llamaclust {
namespace {

constexpr int64_t kRemembersNs = 100'000'000;

bool has_lost_core_lately() {
  static thread_local long seen = -1;
  static thread_local int64_t until_ns = 0;
  rusage usage{};
  if (getrusage(RUSAGE_THREAD, &usage) != 0) return false;
  const int64_t now = now_ns();
  if (seen >= 0 && usage.ru_nivcsw != seen) until_ns = now + kRemembersNs;
  seen = usage.ru_nivcsw;
  return now < until_ns;
}

}  // namespace

bool parks_after(int64_t waited_ns, WaitFor what) {
  if (what == WaitFor::FewRows) return waited_ns >= kShortWaitNs;
  if (what == WaitFor::ManyRows) return waited_ns >= kLongestWaitNs;
  return waited_ns >= kLongWaitNs || (waited_ns >= kShortWaitNs && has_lost_core_lately());
}

}  // namespace llamaclust
