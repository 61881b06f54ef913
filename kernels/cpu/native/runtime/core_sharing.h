// Decides how long a waiting thread spins before it parks.
#pragma once

#include <cstdint>

namespace llamaclust {

// Bounds of spinning, in nanoseconds. Waits below kShortWaitNs cost less than parking, because a parked thread wakes
// some 10 us late on an idle core, and later from a deep sleep state. On a core that no other thread wants, spinning up
// to kLongWaitNs may also cost less, if most waits end soon.
inline constexpr int64_t kShortWaitNs = 40'000, kLongWaitNs = 200'000;

// Returns whether a thread that has waited for `waited_ns` should park. It spins up to `most_ns`, but only up to
// kShortWaitNs if another thread has recently preempted it: a thread that parks gets the core back as soon as it wakes,
// whereas a spinning one finally loses whole time slices.
bool parks_after(int64_t waited_ns, int64_t most_ns);

}  // namespace llamaclust
