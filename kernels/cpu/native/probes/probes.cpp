#include "probes/probes.h"

#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>

#include "runtime/cache_size.h"

namespace llamaclust {

struct ReadPattern {
  int streams;  // Number of places that a thread reads in turn, a cache line each.
  // Threads read successive chunks in turn; otherwise each has a region of its own.
  bool interleaved;
  // Number of chunks by which prefetches are ahead of reads; 0 leaves prefetching to the hardware.
  int prefetch_chunks;
};

constexpr ReadPattern kReadPatterns[] = {{1, false, 0}, {1, false, 1}, {1, true, 0}, {1, true, 1}, {2, false, 0},
                                                {2, false, 1}, {2, true, 0},  {4, false, 0}, {4, false, 1}, {8, false, 0}};

namespace {

using Clock = std::chrono::steady_clock;

// Does some microseconds of work on a thread and returns the number of units.
using Piece = std::function<double(int thread)>;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Returns units per second of all threads together.
double rate(int threads, double seconds, const Piece& piece) {
  std::vector<double> rates(threads);
  std::barrier start(threads);
  const auto work = [&](int thread) {
    start.arrive_and_wait();
    const Clock::time_point begin = Clock::now();
    double units = 0;
    do units += piece(thread);
    while (seconds_since(begin) < seconds);
    rates[thread] = units / seconds_since(begin);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  double sum = 0;
  for (double r : rates) sum += r;
  return sum;
}

int checked(int value, int limit, const char* what) {
  if (value < 1 || value > limit)
    throw std::invalid_argument(std::string(what) + " must be 1 to " + std::to_string(limit));
  return value;
}
int checked_threads(int threads) { return checked(threads, 1024, "threads"); }

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be above 0 and at most 60");
}

double peak(const ArithmeticPiece piece, int threads, double seconds) {
  check_seconds(seconds);
  return rate(checked_threads(threads), seconds, [piece](int) { return piece(); });
}

constexpr size_t kChunkBytes = 4096;
constexpr int kFilling = 1;  // Value of every byte of the buffer.
// Inverse of a word of the buffer, modulo 2^64. A sum of words times it is the number of words.
constexpr uint64_t kWordsOfSum = ~uint64_t{254};
static_assert(kWordsOfSum * 0x0101010101010101 == 1);
constexpr size_t kPieceBytes = 64 * kChunkBytes;
constexpr size_t kMaxStreams = 8;
constexpr size_t kMostBytes = size_t{1} << 30;

// Number of chunks in the part of the buffer that a thread reads.
size_t chunks_of(int threads, int cache_multiple) {
  const size_t wanted = last_cache_bytes(threads) * static_cast<size_t>(cache_multiple);
  const size_t free = static_cast<size_t>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pieces = std::min({wanted, free / 4, kMostBytes}) / kPieceBytes / static_cast<size_t>(threads);
  return std::max<size_t>(pieces, 1) * (kPieceBytes / kChunkBytes);
}

// Reads a chunk of each stream, one cache line of each in turn. Returns the sum of the words.
template <int streams, bool prefetch>
uint64_t read_lines(const uint8_t* const* chunks, const uint8_t* const* ahead) {
  uint64_t sums[8] = {};
  for (size_t offset = 0; offset < kChunkBytes; offset += 64)
    for (int s = 0; s < streams; s++) {
      uint64_t line[8];
      memcpy(line, chunks[s] + offset, 64);
      if (prefetch) __builtin_prefetch(ahead[s] + offset, 0, 0);
      for (int i = 0; i < 8; i++) sums[i] += line[i];
    }
  uint64_t sum = 0;
  for (uint64_t s : sums) sum += s;
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

const uint8_t* ReadProbe::chunk(int thread, size_t number, const ReadPattern& pattern) const {
  number %= chunks_;
  return memory_.data() + (pattern.interleaved ? number * threads_ + thread : thread * chunks_ + number) * kChunkBytes;
}

double ReadProbe::read(int thread, const ReadPattern& pattern) {
  Place& place = places_[thread];
  const Reader reader = (pattern.prefetch_chunks ? reader_of<true> : reader_of<false>)(pattern.streams);
  for (size_t bytes = 0; bytes < kPieceBytes; bytes += pattern.streams * kChunkBytes, place.chunk++) {
    const uint8_t *now[kMaxStreams], *ahead[kMaxStreams];
    for (int s = 0; s < pattern.streams; s++) {
      const size_t number = place.chunk + s * (chunks_ / pattern.streams);
      now[s] = chunk(thread, number, pattern);
      ahead[s] = chunk(thread, number + pattern.prefetch_chunks, pattern);
    }
    place.sum += reader(now, ahead);
  }
  return kPieceBytes;
}

ReadProbe::ReadProbe(int threads, int cache_multiple)
    : threads_(checked_threads(threads)),
      chunks_(chunks_of(threads, checked(cache_multiple, 64, "cache_multiple"))),
      memory_(chunks_ * kChunkBytes * static_cast<size_t>(threads)),
      places_(threads) {
  // Each thread writes the memory that it reads, so that the pages exist and are near the thread.
  rate(threads, 0, [this](int thread) {
    memset(memory_.data() + thread * chunks_ * kChunkBytes, kFilling, chunks_ * kChunkBytes);
    return 1.0;
  });
}

uint64_t ReadProbe::bytes_read() const {
  uint64_t sum = 0;
  for (const Place& place : places_) sum += place.sum;
  return sum * kWordsOfSum * 8;
}

double ReadProbe::measure(double seconds) {
  check_seconds(seconds);
  constexpr size_t kSamples = 9;
  const double slice = seconds / static_cast<double>(std::size(kReadPatterns) + kSamples);
  const auto rate_of = [&](const ReadPattern& pattern) {
    return rate(threads_, slice, [&](int thread) { return read(thread, pattern); });
  };
  const ReadPattern* best = nullptr;
  double most = 0;
  for (const ReadPattern& pattern : kReadPatterns)
    if (const double r = rate_of(pattern); best == nullptr || r > most) best = &pattern, most = r;
  double samples[kSamples];
  for (double& sample : samples) sample = rate_of(*best);
  std::nth_element(samples, samples + kSamples / 2, samples + kSamples);
  return samples[kSamples / 2];
}

double int8_peak(int threads, double seconds) { return peak(int8_piece(), threads, seconds); }

double fma_peak(int threads, double seconds) { return peak(fma_piece(), threads, seconds); }

}  // namespace llamaclust
