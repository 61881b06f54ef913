#include "probes/probes.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <new>

namespace llamaclust {
namespace {

constexpr size_t kChunkBytes = 4096;
constexpr size_t kPieceBytes = 64 * kChunkBytes;
constexpr size_t kMaxStreams = 8;
constexpr size_t kHugePageBytes = size_t{2} << 20;
constexpr size_t kMostBytes = size_t{1} << 30;
constexpr size_t kUsualCacheBytes = size_t{32} << 20;

// What `threads` reach of the last cache together, at most. The system's own figure may be that of a whole processor, of
// which a core reaches a slice; Linux reports the slice.
size_t cache_bytes(int threads) {
  const long whole = sysconf(_SC_LEVEL3_CACHE_SIZE);  // 0 or less where it is unknown
  const size_t most = whole > 0 ? static_cast<size_t>(whole) : kUsualCacheBytes;
  size_t slice_kib = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> slice_kib;  // as in "32768K"
  return slice_kib > 0 ? std::min(most, (slice_kib << 10) * static_cast<size_t>(threads)) : most;
}

size_t buffer_bytes(int threads, int cache_multiple) {
  const size_t wanted = cache_bytes(threads) * static_cast<size_t>(cache_multiple);
  const size_t free = static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::min({wanted, free / 4, kMostBytes});
}

// Reads `lines` cache lines of each stream, in turn.
template <int streams, bool prefetch>
uint64_t read_lines(const uint8_t* const* chunks, const uint8_t* const* ahead) {
  uint64_t sums[8] = {};
  for (size_t offset = 0; offset < kChunkBytes; offset += 64)
    for (int s = 0; s < streams; s++) {
      uint64_t line[8];
      memcpy(line, chunks[s] + offset, 64);
      if (prefetch) __builtin_prefetch(ahead[s] + offset, 0, 0);
      for (int i = 0; i < 8; i++) sums[i] ^= line[i];
    }
  uint64_t sum = 0;
  for (uint64_t s : sums) sum ^= s;
  return sum;
}

using Reader = uint64_t (*)(const uint8_t* const*, const uint8_t* const*);

template <bool prefetch>
Reader reader_of(int streams) {
  if (streams == 1) return &read_lines<1, prefetch>;
  if (streams == 2) return &read_lines<2, prefetch>;
  return streams == 4 ? &read_lines<4, prefetch> : &read_lines<8, prefetch>;
}

}  // namespace

ReadBuffer::ReadBuffer(int threads, int cache_multiple)
    : threads_(threads),
      chunks_(std::max<size_t>(buffer_bytes(threads, cache_multiple) / kPieceBytes / threads, 1) * (kPieceBytes / kChunkBytes)),
      places_(threads) {
  const size_t bytes = (chunks_ * kChunkBytes * threads + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kHugePageBytes, bytes)));
  if (!memory_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
}

void ReadBuffer::fill(int thread) { memset(memory_.get() + thread * chunks_ * kChunkBytes, 1, chunks_ * kChunkBytes); }

const uint8_t* ReadBuffer::chunk(int thread, size_t number, const ReadPattern& pattern) const {
  number %= chunks_;
  return memory_.get() + (pattern.interleaved ? number * threads_ + thread : thread * chunks_ + number) * kChunkBytes;
}

double ReadBuffer::read(int thread, const ReadPattern& pattern) {
  Place& place = places_[thread];
  const Reader reader = (pattern.prefetch_chunks ? reader_of<true> : reader_of<false>)(pattern.streams);
  for (size_t bytes = 0; bytes < kPieceBytes; bytes += pattern.streams * kChunkBytes, place.chunk++) {
    const uint8_t *now[kMaxStreams], *ahead[kMaxStreams];
    for (int s = 0; s < pattern.streams; s++) {
      const size_t number = place.chunk + s * (chunks_ / pattern.streams);
      now[s] = chunk(thread, number, pattern);
      ahead[s] = chunk(thread, number + pattern.prefetch_chunks, pattern);
    }
    place.sum ^= reader(now, ahead);
  }
  return kPieceBytes;
}

}  // namespace llamaclust
