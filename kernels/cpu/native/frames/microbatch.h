// A microbatch (proto/microbatch.proto) as arrays for a backend.
#pragma once

#include "frames/microbatch_frame.h"

namespace llamaclust {

// Of a frame's header; what is known of the frame is not changed.
void read_microbatch(Bytes header, const FrameLimits& limits, MicrobatchFrame& frame);

}  // namespace llamaclust
