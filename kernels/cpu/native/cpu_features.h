// What this CPU can run and its operating system lets it run.
#pragma once

namespace llamaclust {

struct CpuFeatures {
  bool avx2;        // with FMA and F16C
  bool avx512;      // F, BW, DQ, VL
  bool avx512vnni;  // and the 8-bit dot product
};

CpuFeatures cpu_features();

}  // namespace llamaclust
