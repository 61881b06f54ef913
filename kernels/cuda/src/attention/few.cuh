// Scores of few queries, as fast as keys can be read. A thread has two positions of a span, or one if only the first
// half is needed. It reads their keys itself, sixteen bytes at a time, once for all queries of a block.
#pragma once

#include "queries.cuh"

namespace llamaclust::cuda {
namespace {

// P positions of a thread: threadIdx.x and, if P is 2, threadIdx.x + 256.
template <class Kv, int TQ, int P>
struct Keys {
  const Span<Kv, TQ>& span;
  const uint8_t* pieces[P];
  bool there[P];
  int slot;

  DEVICE explicit Keys(const Span<Kv, TQ>& span) : span(span), slot(threadIdx.x % kBlockTokens) {
#pragma unroll
    for (int p = 0; p < P; p++) {
      const int at = p * kThreads + threadIdx.x;
      there[p] = at >= span.first() && at < span.end();
      pieces[p] = there[p] ? span.piece(at) : nullptr;
    }
  }

  // Read a chunk that is whole, or one that may end early; zeros if there is none.
  DEVICE uint4 whole(int p, int chunk) const {
    return there[p] ? load_16_bytes(pieces[p] + (chunk * kBlockTokens + slot) * 16) : make_uint4(0, 0, 0, 0);
  }
  DEVICE uint4 any(int p, int chunk) const {
    const bool is_key = there[p] && chunk < key_chunks<Kv>(span.step.head_dim);
    return is_key ? load_chunk<Kv>(pieces[p], slot, chunk, span.step.head_dim) : make_uint4(0, 0, 0, 0);
  }

  DEVICE void store(const float (&scores)[P][TQ]) const {
    __syncthreads();  // Scores overwrite the queries.
#pragma unroll
    for (int p = 0; p < P; p++)
#pragma unroll
      for (int q = 0; q < TQ; q++)
        span.scores[q * kScoreStride + p * kThreads + threadIdx.x] = mul(scores[p][q], span.step.scale);
    __syncthreads();
  }
};

// Number of adjacent channels, or pairs of them, whose queries fill at least sixteen bytes.
template <int TQ>
inline constexpr int kSixteen = TQ < 4 ? 4 / TQ : 1;

template <int TQ>
struct F16Scores {
  template <int P>
  DEVICE static void add_chunk(const float* queries, const uint4 (&keys)[P], float (&sums)[P][TQ]) {
#pragma unroll
    for (int c = 0; c < F16Kv::kChannels; c += kSixteen<TQ>) {
      float q[kSixteen<TQ> * TQ];
      load_fours(queries + c * TQ, q);
#pragma unroll
      for (int d = 0; d < kSixteen<TQ>; d++)
#pragma unroll
        for (int p = 0; p < P; p++) {
          const float x = element_of(F16Kv{}, keys[p], c + d);
#pragma unroll
          for (int i = 0; i < TQ; i++) sums[p][i] = fma(q[d * TQ + i], x, sums[p][i]);
        }
    }
  }

  // Loads AHEAD chunks together.
  template <int P, int AHEAD>
  DEVICE static void compute(const Span<F16Kv, TQ>& span, const float* queries) {
    const Keys<F16Kv, TQ, P> keys(span);
    const int chunks = key_chunks<F16Kv>(span.step.head_dim), whole = span.step.head_dim / F16Kv::kChannels;
    float sums[P][TQ] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < whole; chunk += AHEAD) {
      uint4 k[AHEAD][P];
#pragma unroll
      for (int n = 0; n < AHEAD; n++)
#pragma unroll
        for (int p = 0; p < P; p++)
          k[n][p] = chunk + n < whole ? keys.whole(p, chunk + n) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int n = 0; n < AHEAD; n++)
        if (chunk + n < whole) add_chunk(queries + (chunk + n) * F16Kv::kChannels * TQ, k[n], sums);
    }
    if (chunks > whole) {
      uint4 k[P];
      for (int p = 0; p < P; p++) k[p] = keys.any(p, whole);
      add_chunk(queries + whole * F16Kv::kChannels * TQ, k, sums);
    }
    keys.store(sums);
  }

  DEVICE static void compute(const Span<F16Kv, TQ>& span) {
    load_queries(span, span.scores);
    __syncthreads();
    if (span.end() <= kThreads)
      compute<1, TQ < 16 ? 16 : 8>(span, span.scores);
    else
      compute<2, TQ < 4 ? 8 : 4>(span, span.scores);
  }
};

template <class Kv, int TQ>
struct ByteScores {
  template <int P>
  DEVICE static void add_chunk(const int32_t* pairs, const uint4 (&keys)[P], int32_t (&sums)[P][TQ]) {
#pragma unroll
    for (int pair = 0; pair < 8; pair += kSixteen<TQ>) {
      int32_t q[kSixteen<TQ> * TQ];
      load_fours(pairs + pair * TQ, q);
#pragma unroll
      for (int d = 0; d < kSixteen<TQ>; d++)
#pragma unroll
        for (int p = 0; p < P; p++) {
          const int32_t word = static_cast<int32_t>(word_of(keys[p], (pair + d) / 2));
#pragma unroll
          for (int i = 0; i < TQ; i++) {
            int32_t& sum = sums[p][i];
            sum = (pair + d) % 2 == 0 ? dp2a_low(q[d * TQ + i], word, sum) : dp2a_high(q[d * TQ + i], word, sum);
          }
        }
    }
  }

  // Loads AHEAD groups of channels together.
  template <int P, int AHEAD>
  DEVICE static void compute(const Span<Kv, TQ>& span, const int32_t* queries) {
    const Keys<Kv, TQ, P> keys(span);
    const int head_dim = span.step.head_dim, groups = groups_of(head_dim);
    float totals[P][TQ] = {};
#pragma unroll 1
    for (int begin = 0; begin < groups; begin += AHEAD) {
      uint4 k[AHEAD][2][P];
      uint16_t scales[AHEAD][P];
#pragma unroll
      for (int n = 0; n < AHEAD; n++)
#pragma unroll
        for (int p = 0; p < P; p++) {
          const int group = begin + n;
          const bool whole = (group + 1) * kGroupChannels <= head_dim;
          k[n][0][p] = whole ? keys.whole(p, 2 * group) : keys.any(p, 2 * group);
          k[n][1][p] = whole ? keys.whole(p, 2 * group + 1) : keys.any(p, 2 * group + 1);
          const uint8_t* scale = keys.pieces[p] + Kv::key_scale(keys.slot, group, head_dim);
          scales[n][p] = keys.there[p] && group < groups ? *reinterpret_cast<const uint16_t*>(scale) : uint16_t{0};
        }
#pragma unroll
      for (int n = 0; n < AHEAD; n++) {
        const int group = begin + n;
        if (group >= groups) break;
        int32_t sums[P][TQ] = {};
        add_chunk(queries + group * 16 * TQ, k[n][0], sums);
        add_chunk(queries + (group * 16 + 8) * TQ, k[n][1], sums);
        const float* by = reinterpret_cast<const float*>(queries) + (groups * 16 + group) * TQ;
#pragma unroll
        for (int p = 0; p < P; p++)
#pragma unroll
          for (int i = 0; i < TQ; i++)
            totals[p][i] = fma(mul(half_to_float(scales[n][p]), by[i]), __int2float_rn(sums[p][i]), totals[p][i]);
      }
    }
    keys.store(totals);
  }

  DEVICE static void compute(const Span<Kv, TQ>& span) {
    int32_t* queries = reinterpret_cast<int32_t*>(span.scores);
    load_queries(span, queries);
    __syncthreads();
    if (span.end() <= kThreads)
      compute<1, TQ < 8 ? 4 : 2>(span, queries);
    else
      compute<2, TQ < 4 ? 2 : 1>(span, queries);
  }
};
template <int TQ>
using Q8Scores = ByteScores<Q8Kv, TQ>;
template <int TQ>
using Int8Scores = ByteScores<Int8Kv, TQ>;

}  // namespace

}  // namespace llamaclust::cuda
