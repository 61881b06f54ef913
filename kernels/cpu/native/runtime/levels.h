// The feature levels built into this program and which of them this machine can run.
#pragma once

#include <string>
#include <vector>

#include "level/level.h"

namespace llamaclust {

// Slowest first; the last is what an unforced choice takes.
std::vector<Level> available_levels();

// The level of that name, or the best for an empty one; std::invalid_argument names what there is.
Level find_level(const std::string& name);

}  // namespace llamaclust
