// Converts a microbatch (proto/microbatch.proto) to arrays for a backend.
#pragma once

#include "frames/microbatch_frame.h"

namespace llamaclust {

// Parses a frame's header. Members of `frame` that are already set are not changed.
void read_microbatch(Bytes header, const FrameLimits& limits, MicrobatchFrame& frame);

}  // namespace llamaclust
