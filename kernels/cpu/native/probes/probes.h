// What this machine can do at best, on the threads given: the limits that speeds are compared with.
#pragma once

#include "probes/read.h"

namespace llamaclust {

// How fast memory is read: a buffer of `cache_multiple` times the last-level cache (but no more than a GiB, or a
// quarter of the free memory), filled once, so that many short measurements can stand beside other work.
// std::invalid_argument outside 1..1024 threads, multiples 1..64, 0..60 seconds.
class ReadProbe {
 public:
  ReadProbe(int threads, int cache_multiple);

  // Bytes a second, all threads together: the best of several plain patterns, each tried twice.
  double measure(double seconds);

 private:
  int threads_;
  ReadBuffer buffer_;
};

// 8-bit multiply-adds a second, by the widest instruction this CPU has for them.
double int8_peak(int threads, double seconds);

// Float32 fused multiply-adds a second; a multiplication and an addition where there is no fused one.
double fma_peak(int threads, double seconds);

}  // namespace llamaclust
