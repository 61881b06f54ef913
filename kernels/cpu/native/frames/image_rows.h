// What rows of images have in a microbatch (proto/microbatch.proto, ImageRows) as arrays for a backend.
#pragma once

#include "frames/microbatch_frame.h"

namespace llamaclust {

// Of a frame whose chunks are known.
void read_image_rows(Bytes images, const FrameLimits& limits, MicrobatchFrame& frame);

}  // namespace llamaclust
