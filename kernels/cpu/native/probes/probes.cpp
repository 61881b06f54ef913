#include "probes/probes.h"

#include <algorithm>
#include <barrier>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <thread>

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

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be above 0 and at most 60");
}

int checked_threads(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
  return threads;
}

int checked_multiple(int cache_multiple) {
  if (cache_multiple < 1 || cache_multiple > 64) throw std::invalid_argument("cache_multiple must be 1 to 64");
  return cache_multiple;
}

double peak(const ArithmeticPiece piece, int threads, double seconds) {
  check_seconds(seconds);
  return rate(checked_threads(threads), seconds, [piece](int) { return piece(); });
}

}  // namespace

ReadProbe::ReadProbe(int threads, int cache_multiple)
    : threads_(checked_threads(threads)), buffer_(threads, checked_multiple(cache_multiple)) {
  rate(threads, 0, [this](int thread) { return buffer_.fill(thread), 1.0; });
}

double ReadProbe::measure(double seconds) {
  check_seconds(seconds);
  constexpr int kRounds = 2;
  const double slice = seconds / (kRounds * std::size(kReadPatterns));
  double best = 0;
  for (int round = 0; round < kRounds; round++)
    for (const ReadPattern& pattern : kReadPatterns)
      best = std::max(best, rate(threads_, slice, [&](int thread) { return buffer_.read(thread, pattern); }));
  return best;
}

double int8_peak(int threads, double seconds) { return peak(int8_piece(), threads, seconds); }

double fma_peak(int threads, double seconds) { return peak(fma_piece(), threads, seconds); }

}  // namespace llamaclust
