// Decides how long a waiting thread spins before it parks.
#pragma once

#include <cstdint>

namespace llamaclust {

// What a thread waits for: the next job or another thread that computes few rows; another thread that computes many rows;
// or a gather.
enum class WaitFor { FewRows, ManyRows, Gather };

// Bounds of spinning, in nanoseconds. Waits below kShortWaitNs cost less than parking, because a parked thread wakes
// some 10 us late on an idle core, and later from a deep sleep state. On a core that no other thread wants, spinning up
// to kLongWaitNs may also cost less, if most waits end soon. Waits of kLongestWaitNs last longer than a time slice.
inline constexpr int64_t kShortWaitNs = 40'000, kLongWaitNs = 200'000, kLongestWaitNs = 8'000'000;

// Returns whether a thread that has waited for `waited_ns` should park. In a job of many rows, a thread that waits long
// waits for one that has lost its core. It spins until that is back, and yields to threads that want this core: if it
// parked, the scheduler would move the other thread here, and both would then share this core while another program has
// the other core for itself. For a gather, a thread spins up to kLongWaitNs, but only up to kShortWaitNs if another
// thread has recently preempted it: a thread that parks gets the core back as soon as it wakes, whereas a spinning one
// finally loses whole time slices.
bool parks_after(int64_t waited_ns, WaitFor what);

}  // namespace llamaclust
