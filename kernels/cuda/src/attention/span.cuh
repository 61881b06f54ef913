// One span of positions for the queries of one KV head: everything but the scores. The order of every sum is that of
// docs/internals/numerics.md. A warp weighs a query's scores; a thread has a channel of some queries.
#pragma once

#include "rounding.cuh"
#include "work.cuh"
#include "math.cuh"

namespace llamaclust::cuda {
inline namespace SEEN_NAMESPACE {

inline constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Scores are [queries][kSpanTokens]. With this stride, adjacent queries are four banks apart.
inline constexpr int kScoreStride = kSpanTokens + 4;

struct Step {
  const int32_t* tables;
  const float* q;
  const uint8_t* kv;
  const float *slopes, *sinks;  // Null for none.
  float *partials, *out;
  int heads, kv_heads, head_dim, value_dim, piece_bytes, slots;
  Window window;
  float scale, soft_cap;  // soft_cap is 0 for none.
};

// Up to TQ queries, in shared memory.
template <int TQ>
struct Queries {
  int32_t blocks[kSpanBlocks];  // Ids of the span's blocks.
  // Positions of the span to which a query attends; none if both are 0.
  int32_t firsts[TQ], ends[TQ];
  float maxima[TQ], sums[TQ];  // Maxima and sums of weights of the spans so far.
  // Factors of the earlier values, and of those of the span.
  float keep[TQ], gain[TQ];
  // Factors at the end, of the values and of a sink.
  float sink_keep[TQ], sink_gain[TQ];
};

// The queries are the tile's rows times `heads` heads that share a KV head.
template <class Kv, int TQ>
struct Span {
  const Step& step;
  const Item& item;
  int kv_head, head, heads;
  int from;  // Position of the first row.
  int span;
  // The slice of kSliceChannels value channels that the block computes; with one slice, all channels.
  int slice, slices;
  // Transformed queries in shared memory, if the step's are not transformed; else null.
  const float* turned;
  Queries<TQ>& queries;
  float* scores;
  float* stage;  // Room for the values of some blocks.

  DEVICE int start() const { return span * kSpanTokens; }
  DEVICE int count() const { return item.rows * heads; }
  DEVICE int row(int query) const { return item.row + query / heads; }
  DEVICE int head_of(int query) const { return head + query % heads; }
  DEVICE int position(int query) const { return from + query / heads; }
  DEVICE int last() const { return from + item.rows - 1; }
  DEVICE const float* query(int query) const {
    if (turned != nullptr) return turned + query * step.head_dim;
    return step.q + (row(query) * step.heads + head_of(query)) * step.head_dim;
  }
  DEVICE bool sees(int query) const { return queries.ends[query] > queries.firsts[query]; }
  DEVICE int first_seen(int query) const { return step.window.first_seen(row(query), position(query)); }
  DEVICE int end_seen(int query) const { return step.window.end_seen(row(query), position(query)); }
  DEVICE bool begins(int query) const { return first_seen(query) / kSpanTokens == span; }
  DEVICE bool ends(int query) const { return (end_seen(query) - 1) / kSpanTokens == span; }

  // Positions of the span, relative to its start, to which some query attends, and to which all queries attend.
  DEVICE int within(int position) const {
    const int at = position - start();
    return at < 0 ? 0 : at < kSpanTokens ? at : kSpanTokens;
  }
  DEVICE int last_row() const { return item.row + item.rows - 1; }
  DEVICE int first() const { return within(step.window.first_seen(item.row, from)); }
  DEVICE int end() const { return within(step.window.end_seen(last_row(), last())); }
  DEVICE int all_first() const { return within(step.window.first_seen(last_row(), last())); }
  DEVICE int all_end() const { return within(step.window.end_seen(item.row, from)); }

  DEVICE const uint8_t* piece(int at) const {
    const int block = queries.blocks[at / kBlockTokens];
    return step.kv + piece_offset(block, kv_head, step.kv_heads, step.piece_bytes);
  }

  DEVICE void begin() const {
    const int i = threadIdx.x;
    if (i < kSpanBlocks && i >= first() / kBlockTokens && i * kBlockTokens < end())
      queries.blocks[i] = step.tables[item.table + span * kSpanBlocks + i];
    if (i >= TQ) return;
    const bool there = i < count();
    const int first = there ? within(first_seen(i)) : 0;
    const int end = there ? within(end_seen(i)) : 0;
    queries.firsts[i] = first < end ? first : 0;
    queries.ends[i] = first < end ? end : 0;
  }

  // Applies the soft cap, then ALiBi, both of whose factors are exact.
  DEVICE void adjust() const {
    for (int i = threadIdx.x; i < count() * kSpanTokens; i += kThreads) {
      const int query = i / kSpanTokens, at = i % kSpanTokens;
      if (at < queries.firsts[query] || at >= queries.ends[query]) continue;
      float& score = scores[query * kScoreStride + at];
      if (step.soft_cap > 0) score = soft_cap(score, step.soft_cap);
      if (step.slopes != nullptr) {
        const float away = __int2float_rn(Window::away(start() + at - position(query)));
        score = fma(step.slopes[head_of(query)], away, score);
      }
    }
  }

  // Turns scores into exp(score - maximum). A warp has a query.
  DEVICE void weigh() const {
    for (int query = threadIdx.x / kWarp; query < count(); query += kWarps)
      if (sees(query)) weigh(query);
  }

  DEVICE void weigh(int query) const {
    constexpr int kEach = kSpanTokens / kWarp;
    const int lane = threadIdx.x % kWarp, first = queries.firsts[query], end = queries.ends[query];
    float* own = scores + query * kScoreStride;
    float score[kEach], top = -__int_as_float(kNotFinite);
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (i * kWarp >= end) break;
      const int at = i * kWarp + lane;
      score[i] = own[at];
      if (at >= first && at < end) top = greater(top, score[i]);
    }
    top = reduce(top, [](float a, float b) { return greater(a, b); });
    // Positions 16 apart are added in order: a lane's own ones alternate with those of the lane 16 further on.
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      if (i * kWarp >= end) break;
      const int at = i * kWarp + lane;
      const float weight = at >= first && at < end ? exp(sub(score[i], top)) : 0.0f;
      own[at] = weight;
      const float other = __shfl_xor_sync(kAllLanes, weight, 16);
      sum = add(sum, lane < 16 ? weight : other);
      sum = add(sum, lane < 16 ? other : weight);
    }
    sum = reduce<16>(sum, [](float a, float b) { return add(a, b); });
    if (lane == 0) keep_sums(query, top, sum);
  }

  DEVICE void keep_sums(int query, float top, float sum) const {
    if (item.slot >= 0) {
      if (slice > 0) return;
      const Partials partials(step.partials, step.slots, step.heads, step.value_dim);
      const int index = partials.index(item.slot + query / heads, head_of(query));
      partials.maxima[index] = top;
      partials.sums[index] = sum;
    } else if (begins(query)) {
      queries.maxima[query] = top;
      queries.sums[query] = sum;
    } else {
      const float before = queries.maxima[query], both = greater(before, top);
      const float keep = exp(sub(before, both)), gain = exp(sub(top, both));
      queries.maxima[query] = both;
      queries.sums[query] = fma(sum, gain, mul(queries.sums[query], keep));
      queries.keep[query] = keep;
      queries.gain[query] = gain;
    }
    if (step.sinks != nullptr && ends(query)) add_sink(query);
  }

  DEVICE void add_sink(int query) const {
    const SinkFactors sink(queries.maxima[query], step.sinks[head_of(query)]);
    queries.sums[query] = sink.sum(queries.sums[query]);
    queries.sink_keep[query] = sink.keep;
    queries.sink_gain[query] = sink.gain;
  }

  // Stores a channel's sum over the span: in its slot, or merged with the earlier spans. Their sums are kept in the
  // output until the last span is merged and the result is divided.
  DEVICE void keep_value(int query, int channel, float value) const {
    if (item.slot >= 0) {
      const Partials partials(step.partials, step.slots, step.heads, step.value_dim);
      partials.channels(item.slot + query / heads, head_of(query))[channel] = value;
      return;
    }
    float& out = step.out[(row(query) * step.heads + head_of(query)) * step.value_dim + channel];
    if (!begins(query)) value = fma(value, queries.gain[query], mul(out, queries.keep[query]));
    if (!ends(query)) {
      out = value;
      return;
    }
    if (step.sinks != nullptr) value = SinkFactors::value(value, queries.sink_keep[query], queries.sink_gain[query]);
    out = div(value, queries.sums[query]);
  }
};

// The part of the heads that a block has, and its items: first, first + step, ...
struct Share {
  int part, first, step;
};

// Computes items one after the other. prepare(span) comes first. Scores::compute(span) then leaves the scores of all
// positions from span.first() to span.end() in span.scores, as products times the attention scale, and synchronizes the
// threads. finish(item, KV head, slices) comes after all spans of an item.
template <class Kv, int TQ, class Scores, class Prepare, class AddValues, class Finish>
DEVICE void attend(const Step& step, const Work& work, int kind, const Share& share, Queries<TQ>& queries, float* scores, float* stage,
                   const float* turned, Prepare prepare, AddValues add_values, Finish finish) {
  const int group = step.heads / step.kv_heads, parts = (group + TQ - 1) / TQ;
  const int kv_head = share.part / parts, part = share.part % parts * TQ;
  const int heads = group - part < TQ ? group - part : TQ;
  const int slices = kind == Work::kFew ? work.slices() : 1;
  for (int i = share.first; i < work.count(kind) * slices; i += share.step) {
    const Item item = work.item(kind, i / slices);
    for (int number = item.span_begin; number < item.span_end; number++) {
      const Span<Kv, TQ> span{step,      item,   kv_head, kv_head * group + part, heads,  item.position, number,
                              i % slices, slices, turned,  queries,                scores, stage};
      __syncthreads();
      span.begin();
      __syncthreads();
      prepare(span);
      Scores::compute(span);
      if (step.soft_cap > 0 || step.slopes != nullptr) {
        span.adjust();
        __syncthreads();
      }
      span.weigh();
      __syncthreads();
      add_values(span);
    }
    finish(item, kv_head, slices);
  }
}

}  // namespace SEEN_NAMESPACE

#define ATTENTION_ARGUMENTS                                                                                           \
  int32_t *plan, int32_t max_rows, int32_t slots, const int32_t *tables, const float *q,                              \
      uint8_t *kv, const float *slopes, const float *sinks, int32_t heads, int32_t kv_heads, int32_t head_dim,        \
      int32_t value_dim, int32_t piece_bytes, int32_t window, int32_t chunked, float scale, float soft_cap,           \
      float *partials, float *out SEEN_ARGUMENTS
#define ATTENTION_STEP                                                                                                \
  {tables, q, kv, slopes, sinks, partials, out, heads, kv_heads, head_dim, value_dim, piece_bytes, slots,  \
   {window, chunked SEEN_VALUES}, scale, soft_cap}

// A kernel for tiles of up to TQ queries. add_values(span) computes and stores the values; its shared memory starts
// `stage` floats after the start of the scores.
#define ATTENTION_KERNEL(name, TQ, Kv, Scores, kind, stage, add_values)                                               \
  KERNEL_IN_BLOCKS(256, 2, name, ATTENTION_ARGUMENTS) {                                                               \
    float* scores = reinterpret_cast<float*>(DYNAMIC_SHARED);                                                         \
    SHARED(Queries<TQ>, queries, );                                                                                   \
    const Step step ATTENTION_STEP;                                                                                   \
    const auto nothing = [](const Span<Kv, TQ>&) {};                                                                  \
    const auto values = [](const Span<Kv, TQ>& span) { add_values(span); };                                           \
    const auto no_end = [](const Item&, int, int) {};                                                                 \
    const Share share{static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)};       \
    attend<Kv, TQ, Scores<TQ>>(step, Work(plan, max_rows, slots), kind, share, queries, scores, scores + (stage),     \
                               nullptr, nothing, values, no_end);                                                              \
  }

}  // namespace llamaclust::cuda
