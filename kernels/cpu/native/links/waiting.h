// Waits for sockets until a time of now_ns().
#pragma once

#include <poll.h>

#include <cstdint>
#include <span>

namespace llamaclust {

// Parks the thread until an event, which is then set in `waited`, or a signal. Returns false at time `until_ns`.
bool wait_for(std::span<pollfd> waited, int64_t until_ns);

}  // namespace llamaclust
