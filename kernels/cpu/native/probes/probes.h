// What this machine can do at best, on the threads given: the limits that speeds are compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/memory.h"

namespace llamaclust {

struct ReadPattern;

// How fast memory is read, by plain reads in several patterns: which is fastest depends on the machine, and on where a
// virtual machine's cores happen to lie. The buffer has `cache_multiple` times the bytes of the last-level cache (but no
// more than a GiB, or a quarter of the free memory), and is filled once, so that many short measurements can stand beside
// other work.
// std::invalid_argument outside 1..1024 threads, multiples 1..64, 0..60 seconds.
class ReadProbe {
 public:
  ReadProbe(int threads, int cache_multiple);

  // Bytes a second, all threads together: the best of several plain patterns, each tried twice.
  double measure(double seconds);

  // What all measurements have read, by the sum of what came.
  uint64_t bytes_read() const;

 private:
  const uint8_t* chunk(int thread, size_t number, const ReadPattern& pattern) const;
  double read(int thread, const ReadPattern& pattern);  // the thread's next piece; returns its bytes

  int threads_;
  size_t chunks_;  // a thread
  Memory memory_;
  struct alignas(64) Place {
    size_t chunk = 0;
    uint64_t sum = 0;  // keeps the reads from being optimized away
  };
  std::vector<Place> places_;
};

// 8-bit multiply-adds a second, by the widest instruction this CPU has for them.
double int8_peak(int threads, double seconds);

// Float32 fused multiply-adds a second; a multiplication and an addition where there is no fused one.
double fma_peak(int threads, double seconds);

// Loops of nothing but multiply-adds in registers, written in assembly: a compiler spills or drops what it sees through.
// Some microseconds of work; returns its multiply-adds.
using ArithmeticPiece = double (*)();

ArithmeticPiece int8_piece();  // by the widest 8-bit dot product this CPU has
ArithmeticPiece fma_piece();   // float32

}  // namespace llamaclust
