// Weighted values of a span. Shared memory has the values of some blocks at a time as floats. A thread has some
// channels of some queries and adds the positions in order.
#pragma once

#include "span.cuh"

namespace llamaclust::cuda {
inline namespace SEEN_NAMESPACE {

// Computes C channels, of BLOCKS blocks at a time.
template <class Kv, int TQ, int BLOCKS, int C>
struct Values {
  static constexpr int kPositions = BLOCKS * kBlockTokens;
  static constexpr int kChannels = TQ >= 16 && C >= 64 ? 4 : TQ * C >= 512 ? 2 : 1;  // Channels of a thread.
  static constexpr int kEach = TQ * C / kThreads / kChannels;
  static constexpr int kQueries = kEach > 1 ? kEach : 1;              // Queries of a thread; some threads have none.
  static constexpr int kQuerySteps = TQ / kQueries;                   // Distance between two queries of a thread.
  static constexpr int kPieces = kPositions * C / Kv::kChannels;      // Number of 16-byte pieces.
  static constexpr int kLoads = (kPieces + kThreads - 1) / kThreads;  // Number of pieces of a thread.
  static constexpr bool kScaled = Kv::kChannelBytes == 1;
  static constexpr int kScales = C / kGroupChannels;  // Scales of a position, stored after all values.

  using Block = Span<Kv, TQ>;
  const Block& span;
  const int channel;  // The first channel.

  struct Loaded {
    uint4 pieces[kLoads];
    float scale;
  };

  DEVICE bool there(int at) const { return at >= span.first() && at < span.end(); }
  DEVICE const uint8_t* values(int at) const { return span.piece(at) + Kv::key_bytes(span.step.head_dim); }

  DEVICE Loaded load(int begin) const {
    Loaded loaded = {};
    const int width = padded_head(span.step.head_dim), i = threadIdx.x;
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int piece = n * kThreads + i, at = begin + piece * Kv::kChannels / C;
      const int c = channel + piece * Kv::kChannels % C;
      if (piece < kPieces && c < width && there(at))
        loaded.pieces[n] = load_16_bytes(values(at) + (at % kBlockTokens * width + c) * Kv::kChannelBytes);
    }
    if constexpr (kScaled) {
      const int at = begin + i / kScales, group = channel / kGroupChannels + i % kScales;
      if (i < kPositions * kScales && group < groups_of(span.step.head_dim) && there(at))
        loaded.scale = half_to_float(*reinterpret_cast<const uint16_t*>(
            values(at) + Kv::value_scale(at % kBlockTokens, group, span.step.head_dim)));
    }
    return loaded;
  }

  DEVICE void store(const Loaded& loaded) const {
    const int i = threadIdx.x;
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int piece = n * kThreads + i;
      if (piece >= kPieces) continue;
#pragma unroll
      for (int c = 0; c < Kv::kChannels; c += 4) {
        const uint4& x = loaded.pieces[n];
        store_four(span.stage + piece * Kv::kChannels + c,
                          make_float4(element_of(Kv{}, x, c), element_of(Kv{}, x, c + 1), element_of(Kv{}, x, c + 2),
                                      element_of(Kv{}, x, c + 3)));
      }
    }
    if constexpr (kScaled)
      if (i < kPositions * kScales) span.stage[kPositions * C + i] = loaded.scale;
  }

  // The first query and channel of a thread. At least two lanes of a warp share each value that they read.
  DEVICE static int first_query() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if constexpr (kChannels == 4)
      return (lane >> 1 & 1) + (lane >> 2 & 6) + warp / (C / 16) * 8;
    else
      return threadIdx.x / (C / kChannels);
  }
  DEVICE static int first_channel() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if constexpr (kChannels == 4)
      return (lane & 1) * 4 + (lane >> 2 & 1) * 8 + warp % (C / 16) * 16;
    else
      return threadIdx.x % (C / kChannels) * kChannels;
  }

  struct Sums {
    float x[kQueries][kChannels];
  };

  DEVICE float weight(float weight, int at) const {
    if constexpr (kScaled)
      return mul(weight, span.stage[kPositions * C + at * kScales + first_channel() / kGroupChannels]);
    else
      return weight;
  }

  // Adds position `at` of those in shared memory, for the queries that attend to it.
  template <class Weight, class Sees>
  DEVICE void add_position(int at, Weight weight_of, Sees sees, Sums& sums) const {
    float x[kChannels];
    const float* from = span.stage + at * C + first_channel();
    if constexpr (kChannels == 4) {
      load_fours(from, x);
    } else if constexpr (kChannels == 2) {
      const float2 two = *reinterpret_cast<const float2*>(from);
      x[0] = two.x, x[1] = two.y;
    } else {
      x[0] = from[0];
    }
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
      const float by = weight(weight_of(q), at);
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        const float sum = fma(by, x[c], sums.x[q][c]);
        if (sees(q)) sums.x[q][c] = sum;
      }
    }
  }

  // Adds positions to which every query attends, four at a time.
  DEVICE void add_all(int begin, Sums& sums) const {
    const float* weights = span.scores + first_query() * kScoreStride + begin;
#pragma unroll 1
    for (int at = 0; at < kPositions; at += 4) {
      float4 four[kQueries];
#pragma unroll
      for (int q = 0; q < kQueries; q++) four[q] = load_four(weights + q * kQuerySteps * kScoreStride + at);
      const auto always = [](int) { return true; };
      add_position(at, [&](int q) { return four[q].x; }, always, sums);
      add_position(at + 1, [&](int q) { return four[q].y; }, always, sums);
      add_position(at + 2, [&](int q) { return four[q].z; }, always, sums);
      add_position(at + 3, [&](int q) { return four[q].w; }, always, sums);
    }
  }

  // Adds other positions. One to which a query does not attend is skipped, not multiplied by 0, because it may hold
  // NaN.
  DEVICE void add_some(int begin, Sums& sums) const {
    const float* weights = span.scores + first_query() * kScoreStride;
    int firsts[kQueries], ends[kQueries];
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
      firsts[q] = span.queries.firsts[first_query() + q * kQuerySteps];
      ends[q] = span.queries.ends[first_query() + q * kQuerySteps];
    }
    const int from = span.first() > begin ? span.first() : begin;
    const int to = span.end() < begin + kPositions ? span.end() : begin + kPositions;
#pragma unroll 4
    for (int at = from; at < to; at++)
      add_position(
          at - begin, [&](int q) { return weights[q * kQuerySteps * kScoreStride + at]; },
          [&](int q) { return at >= firsts[q] && at < ends[q]; }, sums);
  }

  // Called by all threads together, after the weights.
  DEVICE void run() const {
    Sums sums = {};
    const int from = span.first() / kPositions * kPositions, to = span.end();
    const bool works = channel + first_channel() < span.step.head_dim && first_query() < span.count();
    Loaded next = load(from);
    for (int begin = from; begin < to; begin += kPositions) {
      __syncthreads();
      store(next);
      __syncthreads();
      if (begin + kPositions < to) next = load(begin + kPositions);
      if (!works) continue;
      if (begin >= span.all_first() && begin + kPositions <= span.all_end())
        add_all(begin, sums);
      else
        add_some(begin, sums);
    }
    if (works) keep(sums);
  }

  DEVICE void keep(const Sums& sums) const {
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
      const int query = first_query() + q * kQuerySteps;
      if (query >= span.count() || !span.sees(query)) continue;
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        const int at = channel + first_channel() + c;
        if (at < span.step.head_dim) span.keep_value(query, at, sums.x[q][c]);
      }
    }
  }
};

template <int BLOCKS, class Kv, int TQ>
DEVICE void add_values(const Span<Kv, TQ>& span) {
  if (span.step.head_dim <= 64) return Values<Kv, TQ, BLOCKS, 64>{span, 0}.run();
  for (int channel = 0; channel < span.step.head_dim; channel += 128) Values<Kv, TQ, BLOCKS, 128>{span, channel}.run();
}

}  // namespace SEEN_NAMESPACE
}  // namespace llamaclust::cuda
