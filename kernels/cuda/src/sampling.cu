// The records with which the host samples most tokens: the best logits of a row and sums of all weights, in the format
// of the CPU's sampler (sampler/ranked.h).
#include "math.cuh"
#include "sampler/ranked.h"

namespace llamaclust::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPieceLogits = 64;  // Logits of a piece, whose maximum is computed first.
constexpr int kPiecesOfWarp = 4;
constexpr int kEach = kSummedLogits / kThreads;  // Logits of a thread.
constexpr int kWanted = 256;                     // Number of candidates, if there are many pieces.
constexpr int kFewPieces = 16;                   // With up to so many pieces, all logits are candidates.
// Bits of a threshold that are searched. Fewer bits give a lower threshold, with some more candidates.
constexpr int kThresholdBits = 16;
constexpr uint32_t kOrderedLeast = 0x007fffff;  // ordered_bits of -infinity.

DEVICE float minus_infinity() { return __int_as_float(static_cast<int32_t>(0xff800000)); }
DEVICE float greater(float a, float b) { return a > b ? a : b; }
DEVICE int pieces_of(int vocabulary) { return (vocabulary + kPieceLogits - 1) / kPieceLogits; }

// Returns an integer that has the order of the values. +0 and -0 are equal.
DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(add(x, 0.0f));
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

struct Record {
  uint64_t* keys;
  int64_t* sums;
  RankedEnd* end;

  DEVICE Record(int64_t* records, int row, int vocabulary) {
    const int chunks = (vocabulary + kSummedLogits - 1) / kSummedLogits;
    const size_t words = kMostCandidates + chunks + kEndWords;
    int64_t* own = records + row * words;
    keys = reinterpret_cast<uint64_t*>(own);
    sums = own + kMostCandidates;
    end = reinterpret_cast<RankedEnd*>(sums + chunks);
  }

  DEVICE void add_candidate(uint32_t ordered, int id) const {
    const int place = atomicAdd(&end->count, 1);
    if (place < kMostCandidates) keys[place] = static_cast<uint64_t>(~ordered) << 32 | static_cast<uint32_t>(id);
  }
};

// Reduces x over all threads by f. Two consecutive calls must have steps of different parity.
template <class T, class F>
DEVICE T of_block(T x, T (&warps)[2][kWarps], int step, F f) {
  T (&own)[kWarps] = warps[step % 2];
  x = reduce(x, f);
  if (threadIdx.x % kWarp == 0) own[threadIdx.x / kWarp] = x;
  __syncthreads();
  T all = own[0];
#pragma unroll
  for (int i = 1; i < kWarps; i++) all = f(all, own[i]);
  return all;
}

// Returns ordered bits (all but the upper ones 0) that the maxima of enough pieces reach; 0 if all logits reach it.
DEVICE uint32_t threshold(const float* tops, int pieces) {
  if (pieces <= kFewPieces) return 0;
  SHARED(int32_t, counts, [2][kWarps]);
  const int wanted = pieces / 2 < kWanted ? pieces / 2 : kWanted;
  uint32_t least = 0;
  for (int bit = 31; bit >= 32 - kThresholdBits; bit--) {
    const uint32_t tried = least | 1u << bit;
    int32_t reached = 0;
    for (int i = threadIdx.x; i < pieces; i += kThreads) reached += ordered_bits(tops[i]) >= tried ? 1 : 0;
    if (of_block(reached, counts, bit, [](int32_t a, int32_t b) { return a + b; }) >= wanted) least = tried;
  }
  return least > kOrderedLeast ? least : 0;
}

// kEach logits of a thread; -infinity beyond the last one.
struct Logits {
  float x[kEach];

  DEVICE static int first() { return blockIdx.x * kSummedLogits + threadIdx.x; }
  DEVICE Logits(const float* row, int vocabulary) {
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      const int i = first() + k * kThreads;
      x[k] = i < vocabulary ? row[i] : minus_infinity();
    }
  }
};

// Sums of weights like weigh_lanes of the CPU's sampler: high * 2^20 + low. `distance` is already divided by the
// temperature.
struct Weights {
  int32_t high = 0, low = 0, wrong = 0;

  DEVICE void add_weight(float distance) {
    float w = exp(distance);
    wrong |= w != w ? 1 : 0;
    w = w < 2.0f ? w : 0.0f;
    const float scaled = mul(w, 0x1p20f);
    const int32_t whole = to_int(scaled);
    high += whole;
    low += to_int(mul(sub(scaled, to_float(whole)), 0x1p20f));
  }

  // Sums over all threads; the first one stores the result.
  DEVICE void store_sum(int64_t* to) const {
    SHARED(int32_t, warps, [3][kWarps]);
    const auto sum = [](int32_t a, int32_t b) { return a + b; };
    const int32_t sums[3] = {reduce(high, sum), reduce(low, sum), reduce(wrong, sum)};
    if (threadIdx.x % kWarp == 0)
      for (int i = 0; i < 3; i++) warps[i][threadIdx.x / kWarp] = sums[i];
    __syncthreads();
    if (threadIdx.x > 0) return;
    int64_t total = 0;
    int32_t none = 0;
    for (int i = 0; i < kWarps; i++) {
      total += static_cast<int64_t>(warps[0][i]) * (1 << 20) + warps[1][i];
      none |= warps[2][i];
    }
    *to = none != 0 ? -1 : total;
  }
};

}  // namespace

// tops[row][piece] = the maximum of 64 logits, arbitrary if one is NaN. Grid: (pieces / 32 rounded up, rows), blocks of
// 256 threads.
KERNEL(256, maxima, const float* logits, int32_t vocabulary, const int32_t* rows, float* tops, int64_t* records) {
  const int row = blockIdx.y, lane = threadIdx.x % kWarp, pieces = pieces_of(vocabulary);
  if (row >= *rows) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) Record(records, row, vocabulary).end->count = 0;
  const float* x = logits + static_cast<size_t>(row) * vocabulary;
  const int first = (blockIdx.x * kWarps + threadIdx.x / kWarp) * kPiecesOfWarp;
  float top[kPiecesOfWarp];
#pragma unroll
  for (int k = 0; k < kPiecesOfWarp; k++) {
    const int i = (first + k) * kPieceLogits + lane;
    top[k] = greater(i < vocabulary ? x[i] : minus_infinity(), i + kWarp < vocabulary ? x[i + kWarp] : minus_infinity());
  }
#pragma unroll
  for (int k = 0; k < kPiecesOfWarp; k++) {
    const float all = reduce(top[k], [](float a, float b) { return greater(a, b); });
    if (lane == 0 && first + k < pieces) tops[static_cast<size_t>(row) * pieces + first + k] = all;
  }
}

// Writes the records of rows; launched after `maxima`. Grid: (logits / kSummedLogits rounded up, rows), blocks of 256
// threads.
KERNEL(256, candidates, const float* logits, int32_t vocabulary, const int32_t* rows, const float* tops, int64_t* records) {
  const int row = blockIdx.y, pieces = pieces_of(vocabulary);
  if (row >= *rows) return;
  SHARED(float, greatest, [2][kWarps]);
  const Record record(records, row, vocabulary);
  tops += static_cast<size_t>(row) * pieces;
  float maximum = minus_infinity();
  for (int i = threadIdx.x; i < pieces; i += kThreads) maximum = greater(maximum, tops[i]);
  maximum = of_block(maximum, greatest, 0, [](float a, float b) { return greater(a, b); });
  const uint32_t least = threshold(tops, pieces);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    record.end->maximum = maximum;
    record.end->least = least;
    record.end->unused = 0;
  }
  const Logits own(logits + static_cast<size_t>(row) * vocabulary, vocabulary);
  Weights weights;
#pragma unroll
  for (int k = 0; k < kEach; k++) {
    weights.add_weight(sub(own.x[k], maximum));
    const uint32_t ordered = ordered_bits(own.x[k]);
    if (ordered >= least && ordered > kOrderedLeast) record.add_candidate(ordered, own.first() + k * kThreads);
  }
  weights.store_sum(record.sums + blockIdx.x);
}

// totals[row][part] = sums of weights as in records, at the row's divisor. Rows with a divisor of 0 are skipped. Grid:
// as above.
KERNEL(256, totals, const float* logits, int32_t vocabulary, const int32_t* rows, const float* divisors, int64_t* records,
       int64_t* to) {
  const int row = blockIdx.y;
  if (row >= *rows) return;
  const float divisor = divisors[row];
  if (divisor == 0.0f) return;
  const float maximum = Record(records, row, vocabulary).end->maximum;
  const Logits own(logits + static_cast<size_t>(row) * vocabulary, vocabulary);
  Weights weights;
#pragma unroll
  for (int k = 0; k < kEach; k++) weights.add_weight(div(sub(own.x[k], maximum), divisor));
  weights.store_sum(to + static_cast<size_t>(row) * gridDim.x + blockIdx.x);
}

}  // namespace llamaclust::cuda
