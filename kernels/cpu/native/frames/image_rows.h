// Converts the rows of images in a microbatch (ImageRows in proto/microbatch.proto) to arrays for a backend.
#pragma once

#include "frames/microbatch_frame.h"

namespace llamaclust {

// `frame` already has its chunks.
void read_image_rows(Bytes images, const FrameLimits& limits, MicrobatchFrame& frame);

}  // namespace llamaclust
