// Plain reads of a buffer far larger than the caches, in several patterns: which is fastest depends on the machine, and
// on where a virtual machine's cores happen to lie.
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

}  // namespace llamaclust
