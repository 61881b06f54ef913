#include "probes.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "probes_arithmetic.h"
#include "probes_read.h"

namespace llamaclust {
namespace {

using Clock = std::chrono::steady_clock;

// Does a small piece of work (some microseconds) on a thread and returns how many units it was.
using Piece = std::function<double(int thread)>;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Units a second, all threads together.
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

void check(int threads, double seconds) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be above 0 and at most 60");
}

}  // namespace

double read_bandwidth(int threads, double seconds, int cache_multiple) {
  check(threads, seconds);
  if (cache_multiple < 1 || cache_multiple > 64) throw std::invalid_argument("cache_multiple must be 1 to 64");
  ReadBuffer buffer(threads, cache_multiple);
  rate(threads, 0, [&](int thread) { return buffer.fill(thread), 1.0; });
  constexpr int kRounds = 2;
  double best = 0;
  for (int round = 0; round < kRounds; round++)
    for (const ReadPattern& pattern : kReadPatterns) {
      const double slice = seconds / (kRounds * std::size(kReadPatterns));
      best = std::max(best, rate(threads, slice, [&](int thread) { return buffer.read(thread, pattern); }));
    }
  return best;
}

double int8_peak(int threads, double seconds) {
  check(threads, seconds);
  const ArithmeticPiece piece = int8_piece();
  return rate(threads, seconds, [piece](int) { return piece(); });
}

double fma_peak(int threads, double seconds) {
  check(threads, seconds);
  const ArithmeticPiece piece = fma_piece();
  return rate(threads, seconds, [piece](int) { return piece(); });
}

}  // namespace llamaclust
