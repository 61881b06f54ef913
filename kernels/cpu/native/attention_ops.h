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

// Channels of a stored value or of a sum of values: lanes past head_dim hold anything.
inline constexpr int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Halves of one KV head in one block: keys [head_dim][16 positions], then values [16 positions][padded_head].
inline constexpr size_t kv_piece_halves(int head_dim) {
  return static_cast<size_t>(head_dim + padded_head(head_dim)) * kKvBlockTokens;
}

// Query vectors that share one KV head, over one span of positions.
struct SpanTask {
  const uint16_t* head;   // f16: the KV head's piece of block 0 (kv_piece_halves)
  size_t block_stride;    // halves from a block to the next
  const int32_t* blocks;  // ids of the span's blocks
  int blocks_after;       // ids that follow these and are read next
  int head_dim;
  float scale;
  int queries;           // <= kTileQueries
  const float* q;        // [queries][head_dim]
  const int* positions;  // [queries] how many of the span's positions each one sees: 1 to 512, ascending
  float* scores;         // [kScoredQueries][kSpanTokens] scratch
};

// What the positions so far give: the greatest score, sum of exp(score - maximum), values weighted by these. Sixteen
// more than `queries` of the first two are read and written.
struct SpanSums {
  float* maximum;  // [queries + 16]
  float* sum;      // [queries + 16]
  float* values;   // [queries][padded_head]
};

struct AttentionOps {
  // Writes one row's key and value of a KV head, rounded to f16, as position `slot` of the head's piece of a block.
  void (*store)(const float* key, const float* value, int head_dim, int slot, uint16_t* piece);
  // sums = the span's. Memory beyond a query's positions is read and may hold anything.
  void (*span)(const SpanTask& task, const SpanSums& sums);
  // total = total and then the next span: m = max of both; each side times exp(its maximum - m), total's first.
  void (*merge)(const SpanSums& total, const SpanSums& next, int queries, int head_dim);
  // out[query][head_dim] = values / sum, for one query of the total.
  void (*finish)(const float* values, float sum, int head_dim, float* out);
};

}  // namespace llamaclust
