// The result of a microbatch (proto/sampling.proto) as bytes: those that the codec makes of it.
#pragma once

#include <string>
#include <vector>

#include "frames/microbatch_frame.h"
#include "sampler/sampler.h"

namespace llamaclust {

// Of rows none of which failed.
std::string write_result(const MicrobatchFrame& frame, const Timing& timing, const std::vector<RowOutcome>& rows);

}  // namespace llamaclust
