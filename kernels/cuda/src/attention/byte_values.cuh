// Weighted values of a span in integers. For 64 positions at a time, shared memory has values as bytes, and weights
// (multiplied by the scales of the values) as unsigned bytes with one scale for each query and 32 channels. A thread
// has four channels of some queries.
#pragma once

#include "span.cuh"

namespace llamaclust::cuda {
inline namespace SEEN_NAMESPACE {

// Computes C channels at a time.
template <int TQ, int C>
struct ByteValues {
  static constexpr int kPositions = 64, kGroups = C / kGroupChannels, kChannels = 4;
  static constexpr int kQuerySteps = kThreads / (C / kChannels);         // Distance between two queries of a thread.
  static constexpr int kQueries = (TQ + kQuerySteps - 1) / kQuerySteps;  // Number of queries of a thread.
  static constexpr float kMostWeight = 254.0f, kLeastTop = 0x1p-100f;

  const Span<Int8Kv, TQ>& span;
  const int channel;  // The first channel.

  using Sums = float[kQueries][kChannels];

  // Layout of shared memory: values [position][channel], scales [position][group], scales of weights [query][group],
  // weights [query][group][position].
  DEVICE uint8_t* values() const { return reinterpret_cast<uint8_t*>(span.stage); }
  DEVICE float* scales() const { return span.stage + kPositions * C / 4; }
  DEVICE float* units() const { return scales() + kPositions * kGroups; }
  DEVICE uint8_t* weights() const { return reinterpret_cast<uint8_t*>(units() + TQ * kGroups); }

  DEVICE bool there(int at) const { return at >= span.first() && at < span.end(); }

  // Loads values and their scales, or zeros at positions to which no query attends.
  DEVICE void load(int begin) const {
    const int head_dim = span.step.head_dim, width = padded_head(head_dim);
    for (int i = threadIdx.x; i < kPositions * C / 16; i += kThreads) {
      const int at = begin + i * 16 / C, c = channel + i * 16 % C;
      uint4 bytes = make_uint4(0, 0, 0, 0);
      if (c < width && there(at))
        bytes = load_16_bytes(span.piece(at) + Int8Kv::key_bytes(head_dim) + at % kBlockTokens * width + c);
      reinterpret_cast<uint4*>(values())[i] = bytes;
    }
    for (int i = threadIdx.x; i < kPositions * kGroups; i += kThreads) {
      const int at = begin + i / kGroups, group = channel / kGroupChannels + i % kGroups;
      float scale = 0;
      if (group < groups_of(head_dim) && there(at)) {
        const uint8_t* from = span.piece(at) + Int8Kv::key_bytes(head_dim);
        scale = half_to_float(
            *reinterpret_cast<const uint16_t*>(from + Int8Kv::value_scale(at % kBlockTokens, group, head_dim)));
      }
      scales()[i] = scale;
    }
  }

  // Rounds weights. A warp has a query's weights for a group of channels.
  DEVICE void round_weights(int begin) const {
    const int lane = threadIdx.x % kWarp;
    for (int item = threadIdx.x / kWarp; item < TQ * kGroups; item += kWarps) {
      const int query = item / kGroups, group = item % kGroups;
      const int first = span.queries.firsts[query], end = span.queries.ends[query];
      float scaled[2];
      int32_t top = 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int place = i * kWarp + lane, at = begin + place;
        const bool seen = at >= first && at < end;
        scaled[i] = seen ? mul(span.scores[query * kScoreStride + at], scales()[place * kGroups + group]) : 0.0f;
        const int32_t bits = __float_as_int(scaled[i]);
        top = bits > top ? bits : top;
      }
      const float greatest = __int_as_float(greatest_of(top));
      const bool none = greatest < kLeastTop;
      const float inverse = none ? 0.0f : div(kMostWeight, greatest);
#pragma unroll
      for (int i = 0; i < 2; i++)
        weights()[item * kPositions + i * kWarp + lane] = static_cast<uint8_t>(nearest(mul(scaled[i], inverse)));
      if (lane == 0) units()[item] = none ? 0.0f : div(greatest, kMostWeight);
    }
  }

  DEVICE static int first_query() { return threadIdx.x / (C / kChannels); }
  DEVICE static int first_channel() { return threadIdx.x % (C / kChannels) * kChannels; }

  // Transposes four words, of four channels of a position each, to words of four positions of a channel.
  DEVICE static void transpose(uint32_t (&x)[4]) {
    const uint32_t low[2] = {__byte_perm(x[0], x[1], 0x5140), __byte_perm(x[2], x[3], 0x5140)};
    const uint32_t high[2] = {__byte_perm(x[0], x[1], 0x7362), __byte_perm(x[2], x[3], 0x7362)};
    x[0] = __byte_perm(low[0], low[1], 0x5410);
    x[1] = __byte_perm(low[0], low[1], 0x7632);
    x[2] = __byte_perm(high[0], high[1], 0x5410);
    x[3] = __byte_perm(high[0], high[1], 0x7632);
  }

  DEVICE void add(Sums& sums) const {
    const int group = first_channel() / kGroupChannels;
    int32_t exact[kQueries][kChannels] = {};
#pragma unroll 4
    for (int at = 0; at < kPositions; at += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = *reinterpret_cast<const uint32_t*>(values() + (at + i) * C + first_channel());
      transpose(x);
#pragma unroll
      for (int q = 0; q < kQueries; q++) {
        const int item = (first_query() + q * kQuerySteps) * kGroups + group;
        const uint32_t four = *reinterpret_cast<const uint32_t*>(weights() + item * kPositions + at);
#pragma unroll
        for (int c = 0; c < kChannels; c++) exact[q][c] = dp4a(four, static_cast<int32_t>(x[c]), exact[q][c]);
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
      const float unit = units()[(first_query() + q * kQuerySteps) * kGroups + group];
#pragma unroll
      for (int c = 0; c < kChannels; c++) sums[q][c] = fma(unit, __int2float_rn(exact[q][c]), sums[q][c]);
    }
  }

  // Called by all threads together. The weights of the span are in shared memory.
  DEVICE void run() const {
    Sums sums = {};
    const bool works = channel + first_channel() < span.step.head_dim && first_query() < TQ;
    for (int begin = span.first() / kPositions * kPositions; begin < span.end(); begin += kPositions) {
      __syncthreads();
      load(begin);
      __syncthreads();
      round_weights(begin);
      __syncthreads();
      if (works) add(sums);
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
        if (at < span.step.head_dim) span.keep_value(query, at, sums[q][c]);
      }
    }
  }
};

template <int BLOCKS, int TQ>
DEVICE void add_values(const Span<Int8Kv, TQ>& span) {
  if (span.step.head_dim <= 64) return ByteValues<TQ, 64>{span, 0}.run();
  for (int channel = 0; channel < span.step.head_dim; channel += 128) ByteValues<TQ, 128>{span, channel}.run();
}

}  // namespace SEEN_NAMESPACE
}  // namespace llamaclust::cuda
