// Attention of many queries, as in prefill: as fast as multiply-adds go. A chunk of channels of all the span's keys is in
// shared memory at a time, read once for all queries of the tile; a thread has TQ / 4 queries and every 64th position.
#include "attention_queries.cuh"
#include "attention_values.cuh"

namespace llamaclust::cuda {
namespace {

inline constexpr int kColumns = 8, kColumnStep = kSpanTokens / kColumns;  // positions of a thread
inline constexpr int kLoads = kSpanTokens / kThreads;                     // keys that a thread brings

// One chunk of every key that some query sees, on the way to shared memory.
template <class Kv, int TQ>
struct Chunk {
  uint4 keys[kLoads];

  DEVICE void load(const Span<Kv, TQ>& span, int chunk) {
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int at = n * kThreads + threadIdx.x;
      keys[n] = make_uint4(0, 0, 0, 0);
      if (at >= span.first() && at < span.end())
        keys[n] = load_chunk<Kv>(span.piece(at), at % kBlockTokens, chunk, span.step.head_dim);
    }
  }
};

// Columns that hold a position which some query sees: halves are skipped, not single ones.
template <class Kv, int TQ>
DEVICE bool is_half(const Span<Kv, TQ>& span) {
  return span.end() <= kSpanTokens / 2;
}

// Scores of a thread to where they are weighed. The queries were there before.
template <class Kv, int TQ>
DEVICE void store_scores(const Span<Kv, TQ>& span, const float (&scores)[TQ / 4][kColumns]) {
  __syncthreads();
  const int column = threadIdx.x % kColumnStep, query = threadIdx.x / kColumnStep * (TQ / 4);
#pragma unroll
  for (int i = 0; i < TQ / 4; i++)
#pragma unroll
    for (int j = 0; j < kColumns; j++)
      span.scores[(query + i) * kScoreStride + j * kColumnStep + column] = mul(scores[i][j], span.step.scale);
  __syncthreads();
}

template <int TQ>
struct F16Tile {
  static constexpr int kRows = TQ / 4, kChannels = F16Kv::kChannels;
  using Sums = float[kRows][kColumns];

  // Queries and a chunk of keys.
  DEVICE static int staged_floats(int head_dim) {
    return kChannels * (key_chunks<F16Kv>(head_dim) * TQ + kSpanTokens);
  }

  // Floats [channel][position]
  DEVICE static void store(const Chunk<F16Kv, TQ>& chunk, float* to) {
#pragma unroll
    for (int n = 0; n < kLoads; n++)
#pragma unroll
      for (int c = 0; c < kChannels; c++)
        to[c * kSpanTokens + n * kThreads + threadIdx.x] = element_of(F16Kv{}, chunk.keys[n], c);
  }

  template <int columns>
  DEVICE static void add_chunk(const float* keys, const float* queries, Sums& sums) {
#pragma unroll
    for (int c = 0; c < kChannels; c++) {
      float q[kRows], k[columns];
      read_queries(queries + c * TQ, q);
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
    Chunk<F16Kv, TQ> next;
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

template <int TQ>
struct Q8Tile {
  static constexpr int kRows = TQ / 4, kWords = 4;
  using Sums = int32_t[kRows][kColumns];
  using Totals = float[kRows][kColumns];

  // Queries, a chunk of keys and a group's scales.
  DEVICE static int staged_floats(int head_dim) { return 17 * groups_of(head_dim) * TQ + (kWords + 1) * kSpanTokens; }

  // Words of four channels [word][position]
  DEVICE static void store(const Chunk<Q8Kv, TQ>& chunk, int32_t* to) {
#pragma unroll
    for (int n = 0; n < kLoads; n++)
#pragma unroll
      for (int w = 0; w < kWords; w++)
        to[w * kSpanTokens + n * kThreads + threadIdx.x] = static_cast<int32_t>(word_of(chunk.keys[n], w));
  }

  DEVICE static void store_scales(const Span<Q8Kv, TQ>& span, int group, float* to) {
#pragma unroll
    for (int n = 0; n < kLoads; n++) {
      const int at = n * kThreads + threadIdx.x;
      if (at < span.first() || at >= span.end()) continue;
      const uint8_t* scale = span.piece(at) + Q8Kv::key_scale(at % kBlockTokens, group, span.step.head_dim);
      to[at] = half_to_float(*reinterpret_cast<const uint16_t*>(scale));
    }
  }

  template <int columns>
  DEVICE static void add_chunk(const int32_t* keys, const int32_t* pairs, Sums& sums) {
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      int32_t low[kRows], high[kRows], k[columns];
      read_queries(pairs + 2 * w * TQ, low);
      read_queries(pairs + (2 * w + 1) * TQ, high);
#pragma unroll
      for (int j = 0; j < columns; j++) k[j] = keys[w * kSpanTokens + j * kColumnStep];
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < columns; j++) sums[i][j] = dp2a_high(high[i], k[j], dp2a_low(low[i], k[j], sums[i][j]));
    }
  }

  // A group is complete.
  DEVICE static void add_group(const float* scales, const float* queries, Sums& sums, Totals& totals) {
    float by[kRows];
    read_queries(queries, by);
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      const float scale = scales[j * kColumnStep];
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        totals[i][j] = fma(mul(scale, by[i]), __int2float_rn(sums[i][j]), totals[i][j]);
        sums[i][j] = 0;
      }
    }
  }

  DEVICE static void compute(const Span<Q8Kv, TQ>& span) {
    const int chunks = key_chunks<Q8Kv>(span.step.head_dim), groups = groups_of(span.step.head_dim);
    int32_t* queries = reinterpret_cast<int32_t*>(span.scores);
    int32_t* keys = queries + 17 * groups * TQ;
    float* scales = reinterpret_cast<float*>(keys + kWords * kSpanTokens);
    const int column = threadIdx.x % kColumnStep, row = threadIdx.x / kColumnStep * kRows;
    load_queries(span, queries);
    Chunk<Q8Kv, TQ> next;
    next.load(span, 0);
    Sums sums = {};
    Totals totals = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      __syncthreads();
      store(next, keys);
      if (chunk % 2 == 0) store_scales(span, chunk / 2, scales);
      __syncthreads();
      if (chunk + 1 < chunks) next.load(span, chunk + 1);
      if (is_half(span))
        add_chunk<kColumns / 2>(keys + column, queries + chunk * 8 * TQ + row, sums);
      else
        add_chunk<kColumns>(keys + column, queries + chunk * 8 * TQ + row, sums);
      if (chunk % 2 != 0 || chunk + 1 == chunks) {
        const int32_t* by = queries + (groups * 16 + chunk / 2) * TQ + row;
        add_group(scales + column, reinterpret_cast<const float*>(by), sums, totals);
      }
    }
    store_scores(span, totals);
  }
};

// Where scores are weighed, what they are made of was before. Values have room behind it.
template <int TQ, class Scores>
DEVICE int scores_floats(int head_dim) {
  const int staged = Scores::staged_floats(head_dim), scores = TQ * kScoreStride;
  return staged > scores ? staged : scores;
}

}  // namespace

// Grid: (any number of blocks, KV heads times parts of TQ query heads that share one), blocks of 256. A tile has TQ
// divided by these heads rows, one at least (attention_rows.plan's tile_rows).
#define TILE(kv_name, TQ, Kv, Scores)                                                                              \
  KERNEL(256, tile_##kv_name##_##TQ, ATTENTION_ARGUMENTS) {                                                        \
    float* scores = reinterpret_cast<float*>(DYNAMIC_SHARED);                                                      \
    SHARED(Queries<TQ>, queries, );                                                                                \
    const Step step = ATTENTION_STEP;                                                                              \
    const auto values = [](const Span<Kv, TQ>& span) { add_values<1>(span); };                                     \
    attend<Kv, TQ, Scores<TQ>>(step, Work(plan, max_rows, slots), Work::kMany, queries, scores,                    \
                               scores + scores_floats<TQ, Scores<TQ>>(head_dim), values);                          \
  }
TILE(f16, 16, F16Kv, F16Tile)
TILE(f16, 32, F16Kv, F16Tile)
TILE(q8_0, 16, Q8Kv, Q8Tile)

}  // namespace llamaclust::cuda
