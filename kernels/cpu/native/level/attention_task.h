// What the KV types share: where a span's keys and values lie, and which of them are fetched into the cache next.
#pragma once

#include "attention_ops.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

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

INLINE void fetch(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
