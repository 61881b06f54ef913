// Attention over paged KV memory: the part of a level that is compiled for each instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamaclust {

inline constexpr int kKvBlockTokens = 16;
inline constexpr int kSpanTokens = 512;
inline constexpr int kSpanBlocks = kSpanTokens / kKvBlockTokens;
inline constexpr int kTileQueries = 64;
inline constexpr int kScoredQueries = 8;  // Maximum number of queries whose scores are held at a time.

inline constexpr int kMaxHeadChannels = 1024;
inline constexpr int kKvGroup = 32;  // Channels of a key or value that share a scale.

// Types of keys and values in memory: float16, or int8 with a float16 scale for each 32 channels. With Int8, weighted
// values are also summed in integers.
enum class KvType { F16, Q8_0, Int8 };
inline constexpr int kKvTypes = 3;

// These functions are static, so that levels compiled for different CPUs share no copy.
// Number of channels of a stored value, or of a sum of values. Channels from head_dim on may hold anything.
static constexpr int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }
static constexpr int kv_groups(int head_dim) { return (head_dim + kKvGroup - 1) / kKvGroup; }

// Layout of a piece, which is one KV head in one block: all keys, then all values. In latent attention there are only
// keys, whose first channels are the values.
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

// Queries that share one KV head, over one span of positions. Query i attends to positions [firsts[i], ends[i]) of the
// span; both bounds ascend from query to query.
struct SpanTask {
  const uint8_t* head;    // The KV head's piece in block 0.
  size_t block_stride;    // Bytes from one block to the next.
  const int32_t* blocks;  // Ids of the span's blocks.
  int blocks_after;       // Number of ids that follow these and are read next.
  int head_dim, value_dim;
  float scale;
  int queries;         // <= kTileQueries
  const float* q;      // [queries][padded_head], prepared
  const int* firsts;   // [queries], each 0 to 511
  const int* ends;     // [queries], each first + 1 to 512
  float* scores;       // [kScoredQueries][kSpanTokens] scratch
  float soft_cap = 0;  // 0 for none.
  // ALiBi adds -slope * |key position - query position|; both pointers are null without it.
  const float* slopes = nullptr;   // [queries]
  // [queries]: positions of the queries relative to the start of the span, also outside it.
  const int* positions = nullptr;
};

// Result for the positions so far: the maximum score, the sum of exp(score - maximum), and the values weighted by
// these. Sixteen more elements than `queries` are read and written in the first two arrays.
struct SpanSums {
  float* maximum;  // [queries + 16]
  float* sum;      // [queries + 16]
  float* values;   // [queries][padded_head of value_dim]
};

// Functions that depend on the layout of keys and values.
struct KvOps {
  // Rounds one row's key and value of a KV head to the type, and writes them as position `slot` of its piece of a
  // block. `value` is null in latent attention.
  void (*store)(const float* key, const float* value, int head_dim, int slot, uint8_t* piece);
  // Rewrites a query [padded_head] in place into the form that `span` takes.
  void (*prepare)(float* query, int head_dim);
  // Computes the sums of one span. Memory outside a query's positions is read, but its contents do not matter.
  void (*span)(const SpanTask& task, const SpanSums& sums);
  // The variant for latent attention: value_dim is even, and all queries start at position 0.
  void (*latent_span)(const SpanTask& task, const SpanSums& sums);
};

struct AttentionOps {
  KvOps kv[kKvTypes];
  // Merges the next span into the total: with m the greater maximum, each side is multiplied by exp(its maximum - m);
  // the total is the first operand of the sum.
  void (*merge)(const SpanSums& total, const SpanSums& next, int queries, int value_dim);
  // out[value_dim] = values / sum, for one query.
  void (*finish)(const float* values, float sum, int value_dim, float* out);
};

}  // namespace llamaclust
