// What this machine can do at best, on the threads given: the limits that speeds are compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace llamaclust {

struct ReadPattern {
  int streams;          // places that one thread reads from in turn, a cache line each
  bool interleaved;     // threads take turns at chunks; else each has a region of its own
  int prefetch_chunks;  // how many chunks ahead of the reads lines are prefetched; 0: left to the hardware
};

inline constexpr ReadPattern kReadPatterns[] = {{1, false, 0}, {1, false, 1}, {1, true, 0}, {1, true, 1}, {2, false, 0},
                                                {2, false, 1}, {2, true, 0},  {4, false, 0}, {4, false, 1}, {8, false, 0}};

// Plain reads of a buffer far larger than the caches, in several patterns: which is fastest depends on the machine, and
// on where a virtual machine's cores happen to lie.
class ReadBuffer {
 public:
  ReadBuffer(int threads, int cache_multiple);

  void fill(int thread);                                // so that memory is really there, near the thread
  double read(int thread, const ReadPattern& pattern);  // the thread's next piece; returns its bytes

 private:
  const uint8_t* chunk(int thread, size_t number, const ReadPattern& pattern) const;

  int threads_;
  size_t chunks_;  // a thread
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t[], Free> memory_;
  struct alignas(64) Place {
    size_t chunk = 0;
    uint64_t sum = 0;  // keeps the reads from being optimized away
  };
  std::vector<Place> places_;
};

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

// Loops of nothing but multiply-adds in registers, written in assembly: a compiler spills or drops what it sees through.
// Some microseconds of work; returns its multiply-adds.
using ArithmeticPiece = double (*)();

ArithmeticPiece int8_piece();  // by the widest 8-bit dot product this CPU has
ArithmeticPiece fma_piece();   // float32

}  // namespace llamaclust
