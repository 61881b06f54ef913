// Scores of few queries, as fast as keys come: a thread has two positions and reads their keys itself, sixteen bytes at a
// time, once for all queries of a block.
#pragma once

#include "queries.cuh"

namespace llamaclust::cuda {
namespace {

inline constexpr int kPositions = kSpanTokens / kThreads;  // of a thread: threadIdx.x, and 256 on

template <class Kv, int TQ>
struct Keys {
  const Span<Kv, TQ>& span;
  const uint8_t* pieces[kPositions];
  bool there[kPositions];
  int slot;

  DEVICE explicit Keys(const Span<Kv, TQ>& span) : span(span), slot(threadIdx.x % kBlockTokens) {
#pragma unroll
    for (int p = 0; p < kPositions; p++) {
      const int at = p * kThreads + threadIdx.x;
      there[p] = at >= span.first() && at < span.end();
      pieces[p] = there[p] ? span.piece(at) : nullptr;
    }
  }

  // A whole chunk, or one that may end early; zeros where there is none.
  DEVICE uint4 whole(int p, int chunk) const {
    return there[p] ? load_16_bytes(pieces[p] + (chunk * kBlockTokens + slot) * 16) : make_uint4(0, 0, 0, 0);
  }
  DEVICE uint4 any(int p, int chunk) const {
    const bool is_key = there[p] && chunk < key_chunks<Kv>(span.step.head_dim);
    return is_key ? load_chunk<Kv>(pieces[p], slot, chunk, span.step.head_dim) : make_uint4(0, 0, 0, 0);
  }

  DEVICE void store(const float (&scores)[kPositions][TQ]) const {
    __syncthreads();  // the queries are where scores come
#pragma unroll
    for (int p = 0; p < kPositions; p++)
#pragma unroll
      for (int q = 0; q < TQ; q++)
        span.scores[q * kScoreStride + p * kThreads + threadIdx.x] = mul(scores[p][q], span.step.scale);
    __syncthreads();
  }
};

template <int TQ>
struct F16Scores {
  static constexpr int kAhead = 4;  // chunks that are asked for together

  DEVICE static void add_chunk(const float* queries, const uint4 (&keys)[kPositions], float (&sums)[kPositions][TQ]) {
#pragma unroll
    for (int c = 0; c < F16Kv::kChannels; c++) {
      float q[TQ];
      load_fours(queries + c * TQ, q);
#pragma unroll
      for (int p = 0; p < kPositions; p++) {
        const float x = element_of(F16Kv{}, keys[p], c);
#pragma unroll
        for (int i = 0; i < TQ; i++) sums[p][i] = fma(q[i], x, sums[p][i]);
      }
    }
  }

  DEVICE static void compute(const Span<F16Kv, TQ>& span) {
    const float* queries = span.scores;
    load_queries(span, span.scores);
    __syncthreads();
    const Keys<F16Kv, TQ> keys(span);
    const int chunks = key_chunks<F16Kv>(span.step.head_dim), whole = span.step.head_dim / F16Kv::kChannels;
    float sums[kPositions][TQ] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < whole; chunk += kAhead) {
      uint4 k[kAhead][kPositions];
#pragma unroll
      for (int n = 0; n < kAhead; n++)
#pragma unroll
        for (int p = 0; p < kPositions; p++)
          k[n][p] = chunk + n < whole ? keys.whole(p, chunk + n) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int n = 0; n < kAhead; n++)
        if (chunk + n < whole) add_chunk(queries + (chunk + n) * F16Kv::kChannels * TQ, k[n], sums);
    }
    if (chunks > whole) {
      uint4 k[kPositions];
      for (int p = 0; p < kPositions; p++) k[p] = keys.any(p, whole);
      add_chunk(queries + whole * F16Kv::kChannels * TQ, k, sums);
    }
    keys.store(sums);
  }
};

template <class Kv, int TQ>
struct ByteScores {
  DEVICE static void add_chunk(const int32_t* pairs, const uint4 (&keys)[kPositions], int32_t (&sums)[kPositions][TQ]) {
#pragma unroll
    for (int pair = 0; pair < 8; pair++) {
      int32_t q[TQ];
      load_fours(pairs + pair * TQ, q);
#pragma unroll
      for (int p = 0; p < kPositions; p++) {
        const int32_t word = static_cast<int32_t>(word_of(keys[p], pair / 2));
#pragma unroll
        for (int i = 0; i < TQ; i++)
          sums[p][i] = pair % 2 == 0 ? dp2a_low(q[i], word, sums[p][i]) : dp2a_high(q[i], word, sums[p][i]);
      }
    }
  }

  DEVICE static void compute(const Span<Kv, TQ>& span) {
    int32_t* queries = reinterpret_cast<int32_t*>(span.scores);
    load_queries(span, queries);
    __syncthreads();
    const Keys<Kv, TQ> keys(span);
    const int head_dim = span.step.head_dim, groups = groups_of(head_dim);
    float totals[kPositions][TQ] = {};
#pragma unroll 1
    for (int group = 0; group < groups; group++) {
      uint4 k[2][kPositions];
      float scales[kPositions];
      int32_t sums[kPositions][TQ] = {};
#pragma unroll
      for (int p = 0; p < kPositions; p++) {
        const bool whole = (group + 1) * kGroupChannels <= head_dim;
        k[0][p] = whole ? keys.whole(p, 2 * group) : keys.any(p, 2 * group);
        k[1][p] = whole ? keys.whole(p, 2 * group + 1) : keys.any(p, 2 * group + 1);
        const uint8_t* scale = keys.pieces[p] + Kv::key_scale(keys.slot, group, head_dim);
        scales[p] = keys.there[p] ? half_to_float(*reinterpret_cast<const uint16_t*>(scale)) : 0.0f;
      }
      add_chunk(queries + group * 16 * TQ, k[0], sums);
      add_chunk(queries + (group * 16 + 8) * TQ, k[1], sums);
      float by[TQ];
      load_fours(reinterpret_cast<const float*>(queries) + (groups * 16 + group) * TQ, by);
#pragma unroll
      for (int p = 0; p < kPositions; p++)
#pragma unroll
        for (int i = 0; i < TQ; i++)
          totals[p][i] = fma(mul(scales[p], by[i]), __int2float_rn(sums[p][i]), totals[p][i]);
    }
    keys.store(totals);
  }
};
template <int TQ>
using Q8Scores = ByteScores<Q8Kv, TQ>;
template <int TQ>
using Int8Scores = ByteScores<Int8Kv, TQ>;

}  // namespace

}  // namespace llamaclust::cuda
