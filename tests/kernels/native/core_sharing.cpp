// Tests how long waiting threads keep their cores, by the kernel's count of cores that a thread has lost.
#include "runtime/core_sharing.h"

#include <sched.h>
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

using namespace llamaclust;

namespace {

constexpr auto kLimit = std::chrono::seconds(60);

long lost_cores() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nivcsw;
}

bool parks_in_the_middle() { return parks_after((kShortWaitNs + kLongWaitNs) / 2, WaitFor::Gather); }

// A new thread that has lost no core: it parks only after long waits. Tried again where it loses its core meanwhile.
bool keeps_a_core_of_its_own() {
  for (int tries = 0; tries < 1000; tries++) {
    bool parked = true, lost = true;
    std::thread([&] {
      const long before = lost_cores();
      parks_in_the_middle();
      parked = parks_in_the_middle() || parks_after(0, WaitFor::Gather) ||
               parks_after(kShortWaitNs - 1, WaitFor::Gather) || parks_after(kLongWaitNs - 1, WaitFor::Gather) ||
               !parks_after(kLongWaitNs, WaitFor::Gather);
      lost = lost_cores() != before;
    }).join();
    if (!lost) return !parked;
  }
  return false;
}

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);
}

// Beside a thread that computes on the same core: as soon as the core was lost, and until that is long ago.
bool leaves_a_shared_core() {
  std::atomic<bool> ends = false;
  std::atomic<bool> is_right = true;
  std::thread waiting([&] {
    const int core = sched_getcpu();
    pin(core);
    std::thread other([&] {
      pin(core);
      while (!ends) {
      }
    });
    parks_in_the_middle();
    const long before = lost_cores();
    const auto limit = std::chrono::steady_clock::now() + kLimit;
    while (lost_cores() == before && std::chrono::steady_clock::now() < limit) {
    }
    if (!parks_in_the_middle()) is_right = false;     // too long now
    if (parks_after(kShortWaitNs - 1, WaitFor::Gather)) is_right = false;  // as short as ever
    ends = true;
    other.join();
    bool is_forgotten = false;
    while (!is_forgotten && std::chrono::steady_clock::now() < limit) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      is_forgotten = !parks_in_the_middle();
    }
    is_right = is_right && is_forgotten;
  });
  waiting.join();
  return is_right;
}

}  // namespace

// With many rows, a thread that waits for another one does not let the scheduler bring that one to its core.
bool keeps_its_core_for_many_rows() {
  return !parks_after(kLongestWaitNs - 1, WaitFor::ManyRows) && parks_after(kLongestWaitNs, WaitFor::ManyRows) &&
         !parks_after(kShortWaitNs - 1, WaitFor::FewRows) && parks_after(kShortWaitNs, WaitFor::FewRows);
}

int main() {
  if (!keeps_a_core_of_its_own()) std::puts("a thread that has lost no core parks early");
  else if (!leaves_a_shared_core()) std::puts("a thread that has lost its core does not park, or parks for ever");
  else if (!keeps_its_core_for_many_rows()) std::puts("a thread parks early with many rows, or late with few");
  else return 0;
  return 1;
}
