// What this CPU can run and its operating system lets it run.
#pragma once

namespace llamaclust {

// By feature level.
struct CpuFeatures {
  bool generic = true;        // plain C++
  bool avx2 = false;          // with FMA and F16C
  bool avxvnni = false;       // and the 8-bit dot product in 256 bits
  bool avx512 = false;        // F, BW, DQ, VL
  bool avx512vnni = false;    // and the 8-bit dot product
  bool neon = false;          // ARMv8's vectors
  bool neon_dotprod = false;  // and its 8-bit dot product
};

CpuFeatures cpu_features();

}  // namespace llamaclust
