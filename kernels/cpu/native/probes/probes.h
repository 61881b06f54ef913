// Measures the limits of this machine with a number of threads. Speeds are compared with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/memory.h"

namespace llamaclust {

struct ReadPattern;

// Measures the read bandwidth of memory with plain reads in several patterns. The fastest pattern depends on the
// machine, and on the placement of a virtual machine's cores. The buffer has `cache_multiple` times the size of the
// last-level cache, limited to a GiB and to a quarter of the free memory. It is filled once, so that many short
// measurements can run between other work. Throws std::invalid_argument unless there are 1 to 1024 threads, multiples
// of 1 to 64, and 0 to 60 seconds.
class ReadProbe {
 public:
  ReadProbe(int threads, int cache_multiple);

  // Returns bytes per second of all threads together: the maximum of several patterns, each tried twice.
  double measure(double seconds);

  // Returns the number of bytes that all measurements have read, computed from the sum of the data.
  uint64_t bytes_read() const;

 private:
  const uint8_t* chunk(int thread, size_t number, const ReadPattern& pattern) const;
  double read(int thread, const ReadPattern& pattern);  // Reads the thread's next piece and returns its bytes.

  int threads_;
  size_t chunks_;  // Chunks of one thread.
  Memory memory_;
  struct alignas(64) Place {
    size_t chunk = 0;
    uint64_t sum = 0;  // Prevents the compiler from removing the reads.
  };
  std::vector<Place> places_;
};

// Returns 8-bit multiply-adds per second, with the widest instruction that this CPU has for them.
double int8_peak(int threads, double seconds);

// Returns float32 fused multiply-adds per second; without such an instruction, multiplications followed by additions.
double fma_peak(int threads, double seconds);

// A loop of multiply-adds in registers, which takes some microseconds. Returns its number of multiply-adds. The loops
// are assembly, because a compiler would spill registers or remove the computation.
using ArithmeticPiece = double (*)();

ArithmeticPiece int8_piece();  // With the widest 8-bit dot product of this CPU.
ArithmeticPiece fma_piece();   // Float32.

}  // namespace llamaclust
