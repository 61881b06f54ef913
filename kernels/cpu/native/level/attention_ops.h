// Attention over paged KV memory, the part of a level that is compiled per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamaclust {

inline constexpr int kKvBlockTokens = 16;
inline constexpr int kSpanTokens = 512;
inline constexpr int kSpanBlocks = kSpanTokens / kKvBlockTokens;
inline constexpr int kTileQueries = 64;
inline constexpr int kScoredQueries = 8;  // scores of these are held at once

inline constexpr int kMaxHeadChannels = 1024;
inline constexpr int kKvGroup = 32;  // channels of a key or value that share a scale

// How keys and values lie in memory: float16, or int8 with a float16 scale for each 32 channels; with Int8, weighted values
// are summed in integers, too.
enum class KvType { F16, Q8_0, Int8 };
inline constexpr int kKvTypes = 3;

// Functions are static: levels compiled for different CPUs share no copy.
// Channels of a stored value or of a sum of values: lanes past head_dim hold anything.
static constexpr int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }
static constexpr int kv_groups(int head_dim) { return (head_dim + kKvGroup - 1) / kKvGroup; }

// One KV head in one block, its piece: all keys, then all values; of latent attention keys alone, whose first channels
// are the values.
//   F16   keys [head_dim][16 positions], values [16 positions][padded_head]
//   Q8_0  keys [pairs of channels][16 positions][2], their scales [groups][16 positions],
//         values [16 positions][padded_head], their scales [groups][16 positions]
//   Int8  keys [quads of channels][16 positions][4], their scales [groups][16 positions],
//         values [quads of positions][padded_head][4], their scales [groups][16 positions]
static constexpr size_t kv_key_bytes(KvType type, int head_dim) {
  const int together = type == KvType::Int8 ? 4 : 2, channels = (head_dim + together - 1) / together * together;
  return static_cast<size_t>(kKvBlockTokens) *
         static_cast<size_t>(type == KvType::F16 ? 2 * head_dim : channels + 2 * kv_groups(head_dim));
}
static constexpr size_t kv_value_bytes(KvType type, int head_dim) {
  const int channels = padded_head(head_dim);
  return static_cast<size_t>(kKvBlockTokens) *
         static_cast<size_t>(type == KvType::F16 ? 2 * channels : channels + 2 * kv_groups(head_dim));
}
static constexpr size_t kv_piece_bytes(KvType type, int head_dim, bool latent) {
  return kv_key_bytes(type, head_dim) + (latent ? 0 : kv_value_bytes(type, head_dim));
}

// Query vectors that share one KV head, over one span of positions. Each sees positions [first, end) of the span, both
// in ascending order from query to query.
struct SpanTask {
  const uint8_t* head;   // the KV head's piece of block 0
  size_t block_stride;   // bytes from a block to the next
  const int32_t* blocks; // ids of the span's blocks
  int blocks_after;      // ids that follow these and are read next
  int head_dim, value_dim;
  float scale;
  int queries;        // <= kTileQueries
  const float* q;     // [queries][padded_head], prepared
  const int* firsts;  // [queries] 0 to 511
  const int* ends;    // [queries] first + 1 to 512
  float* scores;      // [kScoredQueries][kSpanTokens] scratch
  float soft_cap = 0;  // 0: none
  // Of a linear bias, -slope * the distance of a position to the query's, if there is one:
  const float* slopes = nullptr;   // [queries]
  const int* positions = nullptr;  // [queries] of the queries, counted from the span's start; outside it, too
};

// What the positions so far give: the greatest score, sum of exp(score - maximum), values weighted by these. Sixteen
// more than `queries` of the first two are read and written.
struct SpanSums {
  float* maximum;  // [queries + 16]
  float* sum;      // [queries + 16]
  float* values;   // [queries][padded_head of value_dim]
};

// What depends on how keys and values lie in memory.
struct KvOps {
  // Writes one row's key and value of a KV head, rounded to the type, as position `slot` of its piece of a block. Of
  // latent attention `value` is null.
  void (*store)(const float* key, const float* value, int head_dim, int slot, uint8_t* piece);
  // Rewrites a query [padded_head] in place as `span` wants it.
  void (*prepare)(float* query, int head_dim);
  // sums = the span's. Memory outside a query's positions is read and may hold anything.
  void (*span)(const SpanTask& task, const SpanSums& sums);
  // The same of latent attention: value_dim is even, and all queries begin at position 0.
  void (*latent_span)(const SpanTask& task, const SpanSums& sums);
};

struct AttentionOps {
  KvOps kv[kKvTypes];
  // total = total and then the next span: m = max of both; each side times exp(its maximum - m), total's first.
  void (*merge)(const SpanSums& total, const SpanSums& next, int queries, int value_dim);
  // out[query][value_dim] = values / sum, for one query of the total.
  void (*finish)(const float* values, float sum, int value_dim, float* out);
};

}  // namespace llamaclust
