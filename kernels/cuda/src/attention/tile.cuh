// Scores of many queries, which multiply-adds limit. Keys are read once for all queries of a tile.
#pragma once

#include "queries.cuh"
#include "mma.cuh"

namespace llamaclust::cuda {
namespace {

inline constexpr int kColumns = 8, kColumnStep = kSpanTokens / kColumns;  // Positions of a thread, and their distance.
inline constexpr int kLoads = kSpanTokens / kThreads;                     // Keys that a thread loads.

// One chunk of every key to which some query attends, on the way to shared memory.
template <int TQ>
struct Chunk {
  uint4 keys[kLoads];

  DEVICE void load(const Span<F16Kv, TQ>& span, int chunk) {
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int at = n * kThreads + threadIdx.x;
      keys[n] = make_uint4(0, 0, 0, 0);
      if (at >= span.first() && at < span.end())
        keys[n] = load_chunk<F16Kv>(span.piece(at), at % kBlockTokens, chunk, span.step.head_dim);
    }
  }
};

// Returns whether no query attends to the second half of the span, whose columns are then skipped. (Written inline,
// this gives larger and different machine code.)
template <int TQ>
DEVICE bool is_half(const Span<F16Kv, TQ>& span) {
  return span.end() <= kSpanTokens / 2;
}

// Stores the scores of a thread, overwriting the queries.
template <int TQ>
DEVICE void store_scores(const Span<F16Kv, TQ>& span, const float (&scores)[TQ / 4][kColumns]) {
  __syncthreads();
  const int column = threadIdx.x % kColumnStep, query = threadIdx.x / kColumnStep * (TQ / 4);
#pragma unroll
  for (int i = 0; i < TQ / 4; i++)
#pragma unroll
    for (int j = 0; j < kColumns; j++)
      span.scores[(query + i) * kScoreStride + j * kColumnStep + column] = mul(scores[i][j], span.step.scale);
  __syncthreads();
}

// Shared memory has one chunk of channels of all the span's keys at a time. A thread has TQ / 4 queries and every 64th
// position.
template <int TQ>
struct F16Tile {
  static constexpr int kRows = TQ / 4, kChannels = F16Kv::kChannels;
  using Sums = float[kRows][kColumns];

  // Room for queries and a chunk of keys.
  DEVICE static int staged_floats(int head_dim) {
    return kChannels * (key_chunks<F16Kv>(head_dim) * TQ + kSpanTokens);
  }

  // Layout: floats [channel][position].
  DEVICE static void store(const Chunk<TQ>& chunk, float* to) {
#pragma unroll
    for (int n = 0; n < kLoads; n++)
#pragma unroll
      for (int c = 0; c < kChannels; c++)
        to[c * kSpanTokens + n * kThreads + threadIdx.x] = element_of(F16Kv{}, chunk.keys[n], c);
  }

  template <int columns>
  DEVICE static void add_chunk(const float* keys, const float* queries, Sums& sums) {
#pragma unroll 4
    for (int c = 0; c < kChannels; c++) {
      float q[kRows], k[columns];
      load_fours(queries + c * TQ, q);
#pragma unroll
      for (int j = 0; j < columns; j++) k[j] = keys[c * kSpanTokens + j * kColumnStep];
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < columns; j++) sums[i][j] = fma(q[i], k[j], sums[i][j]);
    }
  }

  DEVICE static void compute(const Span<F16Kv, TQ>& span) {
    const int chunks = key_chunks<F16Kv>(span.step.head_dim);
    float *queries = span.scores, *keys = queries + chunks * kChannels * TQ;
    const float* own_keys = keys + threadIdx.x % kColumnStep;
    const float* own_queries = queries + threadIdx.x / kColumnStep * kRows;
    load_queries(span, queries);
    Chunk<TQ> next;
    next.load(span, 0);
    Sums sums = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      __syncthreads();
      store(next, keys);
      __syncthreads();
      if (chunk + 1 < chunks) next.load(span, chunk + 1);
      if (is_half(span))
        add_chunk<kColumns / 2>(own_keys, own_queries + chunk * kChannels * TQ, sums);
      else
        add_chunk<kColumns>(own_keys, own_queries + chunk * kChannels * TQ, sums);
    }
    store_scores(span, sums);
  }
};

// Uses matrix instructions: the bytes of 16 queries' int16s times keys, which are loaded into registers as they are in
// memory. A warp has every eighth piece of 8 positions. A thread has queries lane / 4 and lane / 4 + 8 as rows of a
// product, and positions 2 (lane % 4) and the next one as columns of the result.
template <class Kv, int TQ>
struct ByteTile {
  static_assert(TQ == 16);
  static constexpr int kPieces = kSpanTokens / 8 / kWarps, kPiece = 8;

  // Layout: lower bytes [TQ][32 * groups + 16, so that rows are in different banks], upper bytes, scales [groups][TQ].
  DEVICE static int row_bytes(int head_dim) { return groups_of(head_dim) * kGroupChannels + 16; }
  DEVICE static int staged_floats(int head_dim) { return 2 * TQ * row_bytes(head_dim) / 4 + TQ * groups_of(head_dim); }

  // The keys that a thread reads for one group of channels.
  struct Keys {
    int32_t words[kPieces][2];
    float scales[kPieces][2];
  };

  DEVICE static int32_t load_word(const uint8_t* piece, int slot, int chunk, int word, int head_dim) {
    const int bytes = chunk_bytes<Kv>(chunk, head_dim) - 4 * word;
    const uint8_t* p = piece + chunk_offset<Kv>(slot, chunk, head_dim) + 4 * word;
    if (chunk_bytes<Kv>(chunk, head_dim) == 16) return *reinterpret_cast<const int32_t*>(p);
    const uint32_t low = bytes > 0 ? reinterpret_cast<const uint16_t*>(p)[0] : 0;
    const uint32_t high = bytes > 2 ? reinterpret_cast<const uint16_t*>(p)[1] : 0;
    return static_cast<int32_t>(low | high << 16);
  }

  DEVICE static int place(int piece) { return (piece * kWarps + threadIdx.x / kWarp) * kPiece; }
  DEVICE static bool there(const Span<Kv, TQ>& span, int piece) {
    return place(piece) + kPiece > span.first() && place(piece) < span.end();
  }

  DEVICE static Keys load(const Span<Kv, TQ>& span, int group) {
    const int lane = threadIdx.x % kWarp, head_dim = span.step.head_dim;
    Keys keys = {};
#pragma unroll
    for (int n = 0; n < kPieces; n++) {
      if (!there(span, n)) continue;
      const uint8_t* piece = span.piece(place(n));
      const int slot = place(n) % kBlockTokens;
      keys.words[n][0] = load_word(piece, slot + lane / 4, 2 * group, lane % 4, head_dim);
      keys.words[n][1] = load_word(piece, slot + lane / 4, 2 * group + 1, lane % 4, head_dim);
      const uint8_t* scales = piece + Kv::key_scale(slot + lane % 4 * 2, group, head_dim);
      const uint32_t two = *reinterpret_cast<const uint32_t*>(scales);
      keys.scales[n][0] = half_to_float(static_cast<uint16_t>(two));
      keys.scales[n][1] = half_to_float(static_cast<uint16_t>(two >> 16));
    }
    return keys;
  }

  struct Queries {
    uint32_t low[4];
    int32_t high[4];
    float scales[2];
  };

  DEVICE static Queries read(const uint8_t* bytes, int group, int head_dim) {
    const int lane = threadIdx.x % kWarp, row = row_bytes(head_dim);
    const uint8_t* low = bytes + lane / 4 * row + group * kGroupChannels + lane % 4 * 4;
    const float* scales = reinterpret_cast<const float*>(bytes + 2 * TQ * row) + group * TQ + lane / 4;
    Queries queries;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint8_t* at = low + i % 2 * 8 * row + i / 2 * 16;
      queries.low[i] = *reinterpret_cast<const uint32_t*>(at);
      queries.high[i] = *reinterpret_cast<const int32_t*>(at + TQ * row);
    }
    queries.scales[0] = scales[0], queries.scales[1] = scales[8];
    return queries;
  }

  DEVICE static void compute(const Span<Kv, TQ>& span) {
    const int head_dim = span.step.head_dim, groups = groups_of(head_dim), row = row_bytes(head_dim);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(span.scores);
    float* scales = reinterpret_cast<float*>(bytes + 2 * TQ * row);
    round_queries(span, [=](int query, int group, int lane, const RoundedQuery& rounded) {
      uint8_t* to = bytes + query * row + group * kGroupChannels + lane;
      to[0] = static_cast<uint8_t>(rounded.q);
      to[TQ * row] = static_cast<uint8_t>(rounded.q >> 8);
      if (lane == 0) scales[group * TQ + query] = rounded.scale;
    });
    __syncthreads();
    float totals[kPieces][4] = {};
#pragma unroll 1
    for (int group = 0; group < groups; group++) {
      const Keys keys = load(span, group);
      const Queries queries = read(bytes, group, head_dim);
#pragma unroll
      for (int n = 0; n < kPieces; n++) {
        if (!there(span, n)) continue;
        int32_t low[4] = {}, high[4] = {};
        multiply_k32(low, queries.low, keys.words[n]);
        multiply_k32(high, queries.high, keys.words[n]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float by = mul(keys.scales[n][i % 2], queries.scales[i / 2]);
          totals[n][i] = fma(by, __int2float_rn(high[i] * 256 + low[i]), totals[n][i]);
        }
      }
    }
    __syncthreads();
    store(span, totals);
    __syncthreads();
  }

  DEVICE static void store(const Span<Kv, TQ>& span, const float (&totals)[kPieces][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kPieces; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int query = lane / 4 + i / 2 * 8, at = place(n) + lane % 4 * 2 + i % 2;
        span.scores[query * kScoreStride + at] = mul(totals[n][i], span.step.scale);
      }
  }
};
template <int TQ>
using Q8Tile = ByteTile<Q8Kv, TQ>;
template <int TQ>
using Int8Tile = ByteTile<Int8Kv, TQ>;

// Scores overwrite their operands in shared memory. The room for values follows.
template <int TQ, class Scores>
DEVICE int scores_floats(Scores, int head_dim) {
  const int staged = Scores::staged_floats(head_dim), scores = TQ * kScoreStride;
  return staged > scores ? staged : scores;
}

}  // namespace

// Grid: (any number of blocks, KV heads times parts of TQ query heads that share one), blocks of 256 threads. A tile
// has TQ / (heads of a part) rows, at least one (attention_rows.plan's tile_rows).
#define TILE(kv_name, TQ, Kv, Scores)                                                                                 \
  ATTENTION_KERNEL(tile_##kv_name##_##TQ, TQ, Kv, Scores, Work::kMany, scores_floats<TQ>(Scores<TQ>{}, head_dim), \
                   add_values<1>)

}  // namespace llamaclust::cuda
