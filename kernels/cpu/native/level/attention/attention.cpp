// Attention over one span. Scores have one lane per position, values one lane per channel. Both are summed in order, so
// results do not depend on register tiles or on the number of queries that are computed together.
#include "level/attention/byte_values.h"
#include "level/attention/kv_types.h"
#include "level/attention/seen.h"
#include "simd/math.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// kQueries is the maximum number of queries that are computed together. For a number of queries, blocks_at_once() and
// channels_at_once() return how many blocks of 16 positions and groups of 16 channels are. There are as many sums as
// registers can hold, but enough to hide the latency of a multiply-add. Keys and values that must be converted justify
// more queries; other types and latent attention have fewer.
#if defined(__AVX512F__)
template <typename Kv>
constexpr int kQueries = kScoredQueries;
constexpr int blocks_at_once(int queries) { return queries <= 2 ? 8 : queries <= 4 ? 4 : 2; }
constexpr int channels_at_once(int queries) { return queries <= 2 ? 8 : queries <= 6 ? 4 : 2; }
#else
#if defined(__AVX2__)
template <typename Kv>
constexpr int kQueries = Kv::kType == KvType::F16 && !Kv::kLatent ? 6 : 2;
#else
template <typename Kv>
constexpr int kQueries = 2;
#endif
constexpr int blocks_at_once(int queries) { return queries == 1 ? 4 : queries == 2 ? 2 : 1; }
constexpr int channels_at_once(int queries) { return queries == 1 ? 4 : queries == 2 ? 2 : 1; }
#endif
// Number of queries whose scores become weights together. It is large enough for their chains of operations to overlap;
// their maxima and sums still fit into the registers beside the intermediate values of exp.
constexpr int kWeighed = 4;

// Computes scores[query][position] of R queries, for P blocks of 16 positions at a time.
template <typename Kv, int R, int P>
void score_tile(const SpanTask& task, const float* queries, int block, const KeyValuePrefetch<Kv>& units) {
  const uint8_t *keys[P], *next[P];
  UNROLL for (int p = 0; p < P; p++) {
    keys[p] = keys_at(task, block + p);
    next[p] = units.at(block - units.begin + p + kUnitsAhead, keys[p]);
  }
  Kv::template score<R, P>(task, queries, keys, next, task.scores + block * kKvBlockTokens);
}

template <typename Kv, int R>
void score_queries(const SpanTask& task, int query, const KeyValuePrefetch<Kv>& units) {
  constexpr int P = blocks_at_once(R);
  const float* queries = task.q + query * padded_head(task.head_dim);
  const int end = units.begin + units.blocks;
  int block = units.begin;
  for (; block + P <= end; block += P) score_tile<Kv, R, P>(task, queries, block, units);
  for (; block < end; block++) score_tile<Kv, R, 1>(task, queries, block, units);
}

// Applies the soft cap to the scores of R queries, including those of masked positions.
template <typename Kv, int R>
void cap_scores(const SpanTask& task, const KeyValuePrefetch<Kv>& units) {
  const F32x16 cap = broadcast(task.soft_cap);
  for (int r = 0; r < R; r++)
    for (int block = units.begin; block < units.begin + units.blocks; block++) {
      float* scores = task.scores + r * kSpanTokens + block * kKvBlockTokens;
      store(scores, soft_cap(load(scores), cap));
    }
}

// Adds -slope * |key position - query position| to the scores of R queries. Both factors are exact.
template <typename Kv, int R>
void bias_scores(const SpanTask& task, int query, const KeyValuePrefetch<Kv>& units) {
  alignas(64) static const float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const F32x16 lanes = load(kLanes);
  for (int r = 0; r < R; r++) {
    const F32x16 slope = broadcast(task.slopes[query + r]);
    for (int block = units.begin; block < units.begin + units.blocks; block++) {
      const int ahead = block * kKvBlockTokens - task.positions[query + r];
      float* scores = task.scores + r * kSpanTokens + block * kKvBlockTokens;
      const F32x16 signed_distance = add(lanes, broadcast(static_cast<float>(ahead)));
      const F32x16 distance = max(signed_distance, sub(zero(), signed_distance));
      store(scores, fma(slope, sub(zero(), distance), load(scores)));
    }
  }
}

// Calls f(i, seen) for each i = 0, 16, ... whose sixteen positions include one to which one of Q queries attends.
// seen(q, x, other) returns x, with lanes to which query q does not attend replaced by those of `other`.
template <int Q, typename F>
INLINE void for_lanes(const int* firsts, const int* ends, F f) {
  const int end = ends[Q - 1];
  int i = firsts[0] / 16 * 16;
  const auto edge = [&](int q, F32x16 x, F32x16 other) { return seen(x, i, firsts[q], ends[q], other); };
  const auto whole = [](int, F32x16 x, F32x16) { return x; };
  for (; i < end && i < firsts[Q - 1]; i += 16) f(i, edge);
  for (; i + 16 <= ends[0]; i += 16) f(i, whole);
  for (; i < end; i += 16) f(i, edge);
}

// Turns scores of Q queries into exp(score - maximum), and sums these. Positions to which a query does not attend count
// as nothing. Meanwhile prefetches `bytes` of each of `units`, one for each query.
template <int Q>
void weigh(float* scores, const int* firsts, const int* ends, const SpanSums& sums, const uint8_t* const* units,
           int bytes) {
  const F32x16 lowest = broadcast(-__builtin_inff());
  F32x16 top[Q], total[Q];
  UNROLL for (int q = 0; q < Q; q++) top[q] = lowest;
  for_lanes<Q>(firsts, ends, [&](int i, auto seen) INLINE_LAMBDA {
    UNROLL for (int q = 0; q < Q; q++) top[q] = max(top[q], seen(q, load(scores + q * kSpanTokens + i), lowest));
  });
  UNROLL for (int q = 0; q < Q; q++) {
    sums.maximum[q] = max_tree(top[q]);
    top[q] = broadcast(sums.maximum[q]);
    total[q] = zero();
  }
  for_lanes<Q>(firsts, ends, [&](int i, auto seen) INLINE_LAMBDA {
    UNROLL for (int q = 0; q < Q; q++) {
      float* at = scores + q * kSpanTokens + i;
      const F32x16 weight = seen(q, exp(sub(load(at), top[q])), zero());
      total[q] = add(total[q], weight);
      store(at, weight);
    }
    for (int at = (i - firsts[0] / 16 * 16) * 4; at < bytes; at += 4 * kSpanTokens)
      UNROLL for (int q = 0; q < Q; q++) fetch_line(units[q], at);
  });
  UNROLL for (int q = 0; q < Q; q++) sums.sum[q] = sum_tree(total[q]);
}

// Computes the weights of R queries, kWeighed at a time.
template <typename Kv, int R>
void weigh_queries(const SpanTask& task, int query, const SpanSums& sums, const KeyValuePrefetch<Kv>& units) {
  static_assert(R <= kMostAhead - kUnitsAhead);
  const auto* cached = reinterpret_cast<const uint8_t*>(task.scores);
  const uint8_t* next[R];
  for (int r = 0; r < R; r++) next[r] = units.at(units.blocks + kUnitsAhead + r, cached);
  const size_t unit_bytes = Kv::kLatent ? kv_key_bytes(Kv::kType, task.head_dim) : kv_value_bytes(Kv::kType, task.head_dim);
  const int bytes = units.last == 0 ? 0 : static_cast<int>(unit_bytes);
  const auto some = [&]<int Q>(int r) {
    const SpanSums to{sums.maximum + query + r, sums.sum + query + r, nullptr};
    weigh<Q>(task.scores + r * kSpanTokens, task.firsts + query + r, task.ends + query + r, to, next + r, bytes);
  };
  int r = 0;
  if constexpr (R >= kWeighed)
    for (; r + kWeighed <= R; r += kWeighed) some.template operator()<kWeighed>(r);
  if constexpr (R % kWeighed != 0) some.template operator()<R % kWeighed>(r);
}

// values[query][channel] += weight * value over positions [begin, end), for R queries and C groups of 16 channels.
template <typename Kv, int R, int C>
void value_tile(const SpanTask& task, const float* weights, int query, int channel, int begin, int end, float* values,
                const KeyValuePrefetch<Kv>& units) {
  const int width = padded_head(task.head_dim);
  float* out = values + query * width + channel;
  F32x16 sums[R][C];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) sums[r][c] = load(out + r * width + c * 16);
  for (int start = begin; start < end;) {
    const int block = start / kKvBlockTokens, block_start = block * kKvBlockTokens;
    const int stop = block_start + kKvBlockTokens < end ? block_start + kKvBlockTokens : end;
    const uint8_t* v = values_at<Kv>(task, block);
    const uint8_t* next = units.at(units.blocks + block - units.begin + kMostAhead, v);
    const typename Kv::template Weights<R, C> block_weights(weights + block_start, v, width, channel);
    if (channel == 0) Kv::fetch_value_scales(next, width);
    for (int i = start - block_start; i < stop - block_start; i++) {
      F32x16 x[C];
      UNROLL for (int c = 0; c < C; c++) x[c] = Kv::channels(v, width, i, channel + c * 16);
      Kv::template fetch_channels<C>(next, width, i, channel);
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sums[r][c] = fma(block_weights.at(r, c, i), x[c], sums[r][c]);
    }
    start = stop;
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) store(out + r * width + c * 16, sums[r][c]);
}

template <typename Kv, int R>
void value_range(const SpanTask& task, const float* weights, int query, int begin, int end, float* values,
                 const KeyValuePrefetch<Kv>& units) {
  constexpr int C = channels_at_once(R);
  const int width = padded_head(task.head_dim);
  int channel = 0;
  for (; channel + 16 * C <= width; channel += 16 * C)
    value_tile<Kv, R, C>(task, weights, query, channel, begin, end, values, units);
  if constexpr (C > 4)
    for (; channel + 64 <= width; channel += 64)
      value_tile<Kv, R, 4>(task, weights, query, channel, begin, end, values, units);
  for (; channel < width; channel += 16) value_tile<Kv, R, 1>(task, weights, query, channel, begin, end, values, units);
}

// Positions to which all R queries attend are computed together; earlier and later ones, one query at a time.
template <typename Kv, int R>
void value_queries(const SpanTask& task, int query, float* values, const KeyValuePrefetch<Kv>& units) {
  const int width = padded_head(task.head_dim), last = query + R - 1;
  const int common_end = task.ends[query];
  const int common = task.firsts[last] < common_end ? task.firsts[last] : common_end;
  for (int i = 0; i < R * width; i++) values[query * width + i] = 0.0f;
  for (int r = 0; r < R - 1; r++)
    if (task.firsts[query + r] < common)
      value_range<Kv, 1>(task, task.scores + r * kSpanTokens, query + r, task.firsts[query + r], common, values, units);
  value_range<Kv, R>(task, task.scores, query, common, common_end, values, units);
  for (int r = 1; r < R; r++) {
    const int begin = task.firsts[query + r] > common_end ? task.firsts[query + r] : common_end;
    if (task.ends[query + r] > begin)
      value_range<Kv, 1>(task, task.scores + r * kSpanTokens, query + r, begin, task.ends[query + r], values, units);
  }
}

// values[query][channel] = the sum of weight * key over the positions to which a query attends, for R queries and C
// channels. Each lane adds every sixteenth position in ascending order; then the lanes are added in a tree.
template <typename Kv, int R, int C>
void latent_tile(const SpanTask& task, int query, int channel, float* values) {
  const int width = padded_head(task.value_dim), common = task.ends[query] / kKvBlockTokens;
  F32x16 sums[R][C], k[C];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) sums[r][c] = zero();
  for (int block = 0; block < common; block++) {
    Kv::template key_channels<C>(keys_at(task, block), task.head_dim, channel, k);
    UNROLL for (int r = 0; r < R; r++) {
      const F32x16 weight = load(task.scores + r * kSpanTokens + block * kKvBlockTokens);
      UNROLL for (int c = 0; c < C; c++) sums[r][c] = fma(weight, k[c], sums[r][c]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    for (int start = common * kKvBlockTokens; start < task.ends[query + r]; start += kKvBlockTokens) {
      const int n = task.ends[query + r] - start < kKvBlockTokens ? task.ends[query + r] - start : kKvBlockTokens;
      Kv::template key_channels<C>(keys_at(task, start / kKvBlockTokens), task.head_dim, channel, k);
      const F32x16 weight = first(n, load(task.scores + r * kSpanTokens + start), zero());
      UNROLL for (int c = 0; c < C; c++) sums[r][c] = fma(weight, first(n, k[c], zero()), sums[r][c]);
    }
  alignas(64) float lanes[R][C][16];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) store(lanes[r][c], sums[r][c]);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) values[(query + r) * width + channel + c] = sum_tree(load(lanes[r][c]));
}

template <typename Kv, int R>
void latent_queries(const SpanTask& task, int query, float* values) {
  constexpr int C = channels_at_once(R);
  static_assert(C % 2 == 0 && kKvGroup % C == 0);
  int channel = 0;
  for (; channel + C <= task.value_dim; channel += C) latent_tile<Kv, R, C>(task, query, channel, values);
  for (; channel < task.value_dim; channel += 2) latent_tile<Kv, R, 2>(task, query, channel, values);
}

template <typename Kv, int R>
void span_queries(const SpanTask& task, int query, const SpanSums& sums, const KeyValuePrefetch<Kv>& units) {
  score_queries<Kv, R>(task, query, units);
  if (task.soft_cap > 0) cap_scores<Kv, R>(task, units);
  if (task.slopes != nullptr) bias_scores<Kv, R>(task, query, units);
  weigh_queries<Kv, R>(task, query, sums, units);
  if constexpr (Kv::kLatent)
    latent_queries<Kv, R>(task, query, sums.values);
  else if constexpr (Kv::kType == KvType::Int8)
    byte_value_queries<R>(task, query, sums.values, units);
  else
    value_queries<Kv, R>(task, query, sums.values, units);
}

// Number of queries that are computed together if fewer than R remain. In latent attention it is halved: the number of
// heads is large and usually a power of two, so few queries remain, and code for every number of them would be half of
// this file's.
template <typename Kv>
constexpr int fewer(int queries) {
  return Kv::kLatent ? queries / 2 : queries - 1;
}

// Computes all queries, R at a time, then the rest with smaller R. The first R queries prefetch the keys of the next
// span.
template <typename Kv, int R>
void span_from(const SpanTask& task, int query, const SpanSums& sums) {
  for (; query + R <= task.queries; query += R) {
    span_queries<Kv, R>(task, query, sums, KeyValuePrefetch<Kv>(task, query, R));
  }
  if constexpr (R > 1)
    if (query < task.queries) span_from<Kv, fewer<Kv>(R)>(task, query, sums);
}

template <typename Kv>
void span(const SpanTask& task, const SpanSums& sums) {
  span_from<Kv, kQueries<Kv>>(task, 0, sums);
}

// Merges up to sixteen queries.
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

void merge(const SpanSums& total, const SpanSums& next, int queries, int value_dim) {
  const int width = padded_head(value_dim);
  const auto from = [=](const SpanSums& sums, int query) {
    return SpanSums{sums.maximum + query, sums.sum + query, sums.values + query * width};
  };
  for (int query = 0; query < queries; query += 16)
    merge_some(from(total, query), from(next, query), queries - query < 16 ? queries - query : 16, width);
}

void finish(const float* values, float sum, int value_dim, float* out) {
  const F32x16 divisor = broadcast(sum);
  for (int c = 0; c < value_dim; c += 16)
    store_first(value_dim - c < 16 ? value_dim - c : 16, out + c, div(load(values + c), divisor));
}

}  // namespace

extern const AttentionOps attention_ops;
const AttentionOps attention_ops = {
    {{F16Kv::store_row, F16Kv::prepare, span<F16Kv>, span<Latent<F16Kv>>},
     {Q8Kv::store_row, Q8Kv::prepare, span<Q8Kv>, span<Latent<Q8Kv>>},
     {Int8Kv::store_row, Int8Kv::prepare, span<Int8Kv>, span<Latent<Int8Kv>>}},
    merge,
    finish};

}  // namespace llamaclust::LLAMACLUST_LEVEL
