// Waiting for sockets until a time of now_ns().
#pragma once

#include <poll.h>

#include <cstdint>
#include <span>

namespace llamaclust {

// Parks the thread until an event, which `waited` then has, or a signal; false once that time is over.
bool wait_for(std::span<pollfd> waited, int64_t until_ns);

}  // namespace llamaclust
