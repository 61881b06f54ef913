// How long a thread that waits for others keeps its core.
#pragma once

#include <cstdint>

namespace llamaclust {

// Shorter waits cost less than parking: a parked thread comes back some 10 us late on an idle core, and later from a deep
// sleep. On a core that nobody else wants, longer ones may cost less as well where most waits end soon.
inline constexpr int64_t kShortWaitNs = 40'000, kLongWaitNs = 200'000;

// Whether a thread parks that has waited for that time and keeps its core for `most_ns`. It parks early on a core that it has
// lost to another thread lately: it gets that back as soon as it wakes, but in a loop it loses whole slices in the end.
bool parks_after(int64_t waited_ns, int64_t most_ns);

}  // namespace llamaclust
