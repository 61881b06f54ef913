// What the KV types share: where a span's keys and values lie, and which of them are fetched into the cache next.
#pragma once

#include "level/attention_ops.h"
#include "simd/dot.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// How many units ahead of what is computed others are fetched: enough to cover the memory's latency, and more from
// the softmax on, which reads nothing.
constexpr int kUnitsAhead = 8, kMostAhead = 16;

#define INLINE inline __attribute__((always_inline))

INLINE const uint8_t* keys_at(const SpanTask& task, int block) {
  return task.head + static_cast<size_t>(task.blocks[block]) * task.block_stride;
}
template <typename Kv>
INLINE const uint8_t* values_at(const SpanTask& task, int block) {
  return keys_at(task, block) + kv_key_bytes(Kv::kType, task.head_dim);
}

// Blocks of the span that queries [query, query + count) see.
INLINE int block_begin(const SpanTask& task, int query) { return task.firsts[query] / kKvBlockTokens; }
INLINE int block_end(const SpanTask& task, int query, int count) {
  return (task.ends[query + count - 1] + kKvBlockTokens - 1) / kKvBlockTokens;
}

// What queries of a span read, in order, in units of the keys or the values of one block: keys, values, and then the
// keys of the next span. Units are fetched into the cache some time before they are computed with.
template <typename Kv>
struct KeyValuePrefetch {
  KeyValuePrefetch(const SpanTask& task, int query, int count)
      : task(task),
        begin(block_begin(task, query)),
        blocks(block_end(task, query, count) - begin),
        last(query > 0 ? 0 : 2 * blocks + task.blocks_after) {}

  // `other`, which is in the cache, where there is nothing to fetch.
  INLINE const uint8_t* at(int unit, const uint8_t* other) const {
    if (unit >= last) return other;
    const int block = begin + unit;
    return unit < blocks || unit >= 2 * blocks ? keys_at(task, unit < blocks ? block : block - blocks)
                                               : values_at<Kv>(task, block - blocks);
  }

  const SpanTask& task;
  const int begin, blocks, last;
};

INLINE void fetch_line(const uint8_t* unit, int offset) { __builtin_prefetch(unit + offset, 0, 2); }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
