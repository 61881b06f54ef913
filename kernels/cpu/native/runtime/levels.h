// The feature levels built into this program and which of them this machine can run.
#pragma once

#include <string>
#include <vector>

#include "level/level.h"

namespace llamaclust {

// What this CPU can run and its operating system lets it run, by feature level.
struct CpuFeatures {
  bool generic = true;        // plain C++
  bool avx2 = false;          // with FMA and F16C
  bool avxvnni = false;       // and the 8-bit dot product in 256 bits
  bool avx512 = false;        // F, BW, DQ, VL
  bool avx512vnni = false;    // and the 8-bit dot product
  bool avx512vbmi = false;    // and look-ups of bytes
  bool amx = false;           // and tile registers, with products of them
  bool neon = false;          // ARMv8's vectors
  bool neon_dotprod = false;  // and its 8-bit dot product
  bool neon_i8mm = false;     // and products of two rows with two
};

CpuFeatures cpu_features();

// Why the system refuses this process a level whose instructions the CPU has; empty: it does not.
std::string refusal(const std::string& level);

// Those that this process may use, slowest first; the last is what an unforced choice takes. Asks the system for what
// levels need.
std::vector<Level> available_levels();

// The level of that name, or the best for an empty one; std::invalid_argument names what there is.
Level find_level(const std::string& name);

}  // namespace llamaclust
