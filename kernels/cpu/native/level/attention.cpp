// Attention over one span: keys one lane a position, values one lane a channel, both walked in order, so that register
// tiles and the number of queries computed together change nothing.
#include "attention_ops.h"
#include "simd/math.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Queries that are computed together at most, and for R of them how many blocks of positions and groups of 16 channels:
// as many sums as registers hold, and no fewer than hide the latency of a multiply-add.
#if defined(__AVX512F__)
constexpr int kQueries = kScoredQueries;
constexpr int blocks_at_once(int queries) { return queries <= 2 ? 8 : queries <= 4 ? 4 : 2; }
constexpr int channels_at_once(int queries) { return queries <= 2 ? 8 : queries <= 6 ? 4 : 2; }
#else
constexpr int kQueries = 2;
constexpr int blocks_at_once(int queries) { return queries == 1 ? 4 : 2; }
constexpr int channels_at_once(int queries) { return queries == 1 ? 4 : 2; }
#endif

#define INLINE inline __attribute__((always_inline))

INLINE const uint16_t* piece(const SpanTask& task, int block) {
  return task.head + static_cast<size_t>(task.blocks[block]) * task.block_stride;
}

// Blocks of values between what is computed and what is fetched into the cache.
constexpr int kBlocksAhead = 4;

INLINE void fetch(const uint16_t* line) { __builtin_prefetch(line, 0, 2); }

INLINE const uint16_t* keys_at(const SpanTask& task, int block) { return piece(task, block); }
INLINE const uint16_t* values_at(const SpanTask& task, int block) {
  return piece(task, block) + task.head_dim * kKvBlockTokens;
}

// scores[query][position] of R queries and P blocks of 16 positions. The first queries fetch what is read next: the
// following blocks, and at the end the first values.
template <int R, int P>
void score_tile(const SpanTask& task, int query, int block, int blocks) {
  F32x16 sums[R][P];
  const uint16_t *keys[P], *next[P];
  const float* q = task.q + query * task.head_dim;
  for (int p = 0; p < P; p++) {
    const int after = block + P + p;
    keys[p] = keys_at(task, block + p);
    next[p] = after < blocks ? keys_at(task, after) : values_at(task, (after - blocks) % blocks);
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) sums[r][p] = zero();
  for (int d = 0; d < task.head_dim; d++) {
    F32x16 k[P];
    for (int p = 0; p < P; p++) k[p] = from_f16(keys[p] + d * kKvBlockTokens);
    if (query == 0 && d % 2 == 0)
      for (int p = 0; p < P; p++) fetch(next[p] + d * kKvBlockTokens);
    for (int r = 0; r < R; r++) {
      const F32x16 x = broadcast(q[r * task.head_dim + d]);
      for (int p = 0; p < P; p++) sums[r][p] = fma(x, k[p], sums[r][p]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++)
      store(task.scores + r * kSpanTokens + (block + p) * kKvBlockTokens, mul(sums[r][p], broadcast(task.scale)));
}

template <int R>
void score_queries(const SpanTask& task, int query, int blocks) {
  constexpr int P = blocks_at_once(R);
  int block = 0;
  for (; block + P <= blocks; block += P) score_tile<R, P>(task, query, block, blocks);
  for (; block < blocks; block++) score_tile<R, 1>(task, query, block, blocks);
}

// Turns one query's scores into exp(score - maximum); lanes past its last position count as nothing.
void weigh(float* scores, int positions, float* maximum, float* sum) {
  const int whole = positions / 16 * 16, rest = positions - whole;
  const F32x16 lowest = broadcast(-__builtin_inff());
  F32x16 top = lowest;
  for (int i = 0; i < whole; i += 16) top = max(top, load(scores + i));
  if (rest > 0) top = max(top, first(rest, load(scores + whole), lowest));
  *maximum = max_tree(top);
  const F32x16 shift = broadcast(*maximum);
  F32x16 total = zero();
  for (int i = 0; i < whole; i += 16) {
    const F32x16 weight = exp(sub(load(scores + i), shift));
    total = add(total, weight);
    store(scores + i, weight);
  }
  if (rest > 0) {
    const F32x16 weight = first(rest, exp(sub(load(scores + whole), shift)), zero());
    total = add(total, weight);
    store(scores + whole, weight);
  }
  *sum = sum_tree(total);
}

// What is read after the values of a span: the keys of the next.
INLINE const uint16_t* fetched_at(const SpanTask& task, int block) {
  const int blocks = (task.positions[task.queries - 1] + kKvBlockTokens - 1) / kKvBlockTokens;
  if (block < blocks) return values_at(task, block);
  return keys_at(task, block < blocks + task.blocks_after ? block : blocks - 1);
}

// values[query][channel] += weight * value over positions [begin, end), for R queries and C groups of 16 channels.
template <int R, int C>
void value_tile(const SpanTask& task, const float* weights, int query, int channel, int begin, int end, float* values) {
  const int width = padded_head(task.head_dim);
  float* out = values + query * width + channel;
  F32x16 sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = load(out + r * width + c * 16);
  for (int start = begin; start < end;) {
    const int block = start / kKvBlockTokens, block_end = (block + 1) * kKvBlockTokens;
    const int stop = block_end < end ? block_end : end;
    const uint16_t *v = values_at(task, block) + channel, *next = fetched_at(task, block + kBlocksAhead) + channel;
    for (int i = start; i < stop; i++) {
      F32x16 x[C];
      for (int c = 0; c < C; c++) x[c] = from_f16(v + (i % kKvBlockTokens) * width + c * 16);
      if (query == 0)
        for (int c = 0; c < C; c += 2) fetch(next + (i % kKvBlockTokens) * width + c * 16);
      for (int r = 0; r < R; r++) {
        const F32x16 weight = broadcast(weights[r * kSpanTokens + i]);
        for (int c = 0; c < C; c++) sums[r][c] = fma(weight, x[c], sums[r][c]);
      }
    }
    start = stop;
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * width + c * 16, sums[r][c]);
}

template <int R>
void value_range(const SpanTask& task, const float* weights, int query, int begin, int end, float* values) {
  constexpr int C = channels_at_once(R);
  const int width = padded_head(task.head_dim);
  int channel = 0;
  for (; channel + 16 * C <= width; channel += 16 * C)
    value_tile<R, C>(task, weights, query, channel, begin, end, values);
  if constexpr (C > 4)
    for (; channel + 64 <= width; channel += 64) value_tile<R, 4>(task, weights, query, channel, begin, end, values);
  for (; channel < width; channel += 16) value_tile<R, 1>(task, weights, query, channel, begin, end, values);
}

// Positions that all R queries see are walked together, the rest one query at a time.
template <int R>
void value_queries(const SpanTask& task, int query, float* values) {
  const int width = padded_head(task.head_dim), common = task.positions[query];
  for (int i = 0; i < R * width; i++) values[query * width + i] = 0.0f;
  value_range<R>(task, task.scores, query, 0, common, values);
  for (int r = 1; r < R; r++)
    if (task.positions[query + r] > common)
      value_range<1>(task, task.scores + r * kSpanTokens, query + r, common, task.positions[query + r], values);
}

template <int R>
void span_queries(const SpanTask& task, int query, const SpanSums& sums) {
  score_queries<R>(task, query, (task.positions[query + R - 1] + kKvBlockTokens - 1) / kKvBlockTokens);
  for (int r = 0; r < R; r++)
    weigh(task.scores + r * kSpanTokens, task.positions[query + r], sums.maximum + query + r, sums.sum + query + r);
  value_queries<R>(task, query, sums.values);
}

// All queries, R at a time, then the rest.
template <int R>
void span_from(const SpanTask& task, int query, const SpanSums& sums) {
  for (; query + R <= task.queries; query += R) span_queries<R>(task, query, sums);
  if constexpr (R > 1)
    if (query < task.queries) span_from<R - 1>(task, query, sums);
}

void span(const SpanTask& task, const SpanSums& sums) { span_from<kQueries>(task, 0, sums); }

// Sixteen queries at most.
void merge_some(const SpanSums& total, const SpanSums& next, int queries, int width) {
  alignas(64) float kept[16], added[16];
  const F32x16 a = load(total.maximum), b = load(next.maximum), top = max(a, b);
  const F32x16 keep = exp(sub(a, top)), gain = exp(sub(b, top));
  store(kept, keep);
  store(added, gain);
  store(total.maximum, top);
  store(total.sum, fma(load(next.sum), gain, mul(load(total.sum), keep)));
  for (int query = 0; query < queries; query++) {
    const F32x16 f = broadcast(kept[query]), g = broadcast(added[query]);
    for (int c = query * width; c < (query + 1) * width; c += 16)
      store(total.values + c, fma(load(next.values + c), g, mul(load(total.values + c), f)));
  }
}

void merge(const SpanSums& total, const SpanSums& next, int queries, int head_dim) {
  const int width = padded_head(head_dim);
  const auto from = [=](const SpanSums& sums, int query) {
    return SpanSums{sums.maximum + query, sums.sum + query, sums.values + query * width};
  };
  for (int query = 0; query < queries; query += 16)
    merge_some(from(total, query), from(next, query), queries - query < 16 ? queries - query : 16, width);
}

void finish(const float* values, float sum, int head_dim, float* out) {
  const F32x16 divisor = broadcast(sum);
  for (int c = 0; c < head_dim; c += 16)
    store_first(head_dim - c < 16 ? head_dim - c : 16, out + c, div(load(values + c), divisor));
}

void store_row(const float* key, const float* value, int head_dim, int slot, uint16_t* block) {
  alignas(64) uint16_t halves[16];
  uint16_t* v = block + head_dim * kKvBlockTokens + slot * padded_head(head_dim);
  for (int c = 0; c < head_dim; c += 16) {
    const int n = head_dim - c < 16 ? head_dim - c : 16;
    to_f16(halves, load_first(n, key + c));
    for (int i = 0; i < n; i++) block[(c + i) * kKvBlockTokens + slot] = halves[i];
    to_f16(v + c, load_first(n, value + c));
  }
}

}  // namespace

extern const AttentionOps attention_ops;
const AttentionOps attention_ops = {store_row, span, merge, finish};

}  // namespace llamaclust::LLAMACLUST_LEVEL
