// The feature levels that are built into this program, and which of them this machine can run.
#pragma once

#include <string>
#include <vector>

#include "level/level.h"

namespace llamaclust {

// Feature levels that both the CPU and its operating system support.
struct CpuFeatures {
  bool generic = true;        // Plain C++.
  bool avx2 = false;          // With FMA and F16C.
  bool avxvnni = false;       // AVX2 with AVX-VNNI, the 8-bit dot product in 256-bit registers.
  bool avx512 = false;        // Subsets F, BW, DQ and VL.
  bool avx512vnni = false;    // AVX-512 with VNNI, the 8-bit dot product.
  bool avx512vbmi = false;    // The level above with VBMI, byte look-ups.
  bool amx = false;           // The level above with AMX tile registers and their int8 products.
  bool neon = false;          // ARMv8 Advanced SIMD.
  bool neon_dotprod = false;  // NEON with the 8-bit dot product.
  bool neon_i8mm = false;     // The level above with int8 products of two rows with two rows.
};

CpuFeatures cpu_features();

// Returns why the system does not permit this process a level that the CPU supports; empty if it permits the level.
std::string refusal(const std::string& level);

// Returns the levels that this process may use, slowest first; the last one is the default. Requests the permission
// that AMX needs.
std::vector<Level> available_levels();

// Returns the level with this name, or the fastest one for an empty name. Throws std::invalid_argument, which lists the
// available levels.
Level find_level(const std::string& name);

}  // namespace llamaclust
