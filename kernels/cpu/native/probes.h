// What this machine can do at best, on the threads given: the limits that speeds are compared with.
#pragma once

namespace llamaclust {

// Bytes a second read from memory: the best of several plain patterns, each over a buffer of `cache_multiple` times the
// last-level cache (or a quarter of the free memory, if that is less), which is filled before the time counts.
// std::invalid_argument outside 1..1024 threads, 0..60 seconds or multiples 1..64.
double read_bandwidth(int threads, double seconds, int cache_multiple);

// 8-bit multiply-adds a second, by the widest instruction this CPU has for them.
double int8_peak(int threads, double seconds);

// Float32 fused multiply-adds a second; a multiplication and an addition where there is no fused one.
double fma_peak(int threads, double seconds);

}  // namespace llamaclust
