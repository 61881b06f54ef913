// The division of a microbatch's rows, as attention_rows.plan writes it and the other kernels of attention read it.
#pragma once

#include "kv.cuh"
#include "math.cuh"

namespace llamaclust::cuda {

// Rows of one sequence that are computed together, and the spans of positions that a block computes for them one after
// the other. An item with a slot is one span of several; its sums go to the slots that start there, one per row, and
// are merged later. `position` is that of the first row. `spans` is the number of spans of the tile; 0 without a slot.
struct Item {
  int32_t row, rows, table, span_begin, span_end, slot, position, spans;
};

// Contents of the plan:
// - the numbers of items of few and of many queries;
// - the number of slices into which the values of an item of few queries are divided;
// - for each row the start of its block table, and if its spans are merged later: how many there are, the first one's
// slot, and the step to the next slot;
// - for each row and KV head, or for the first of several KV heads: the number of blocks that have finished it, if
// these merge the spans. The last block resets it to 0.
struct Work {
  DEVICE Work(int32_t* plan, int max_rows, int slots)
      : base(plan), max_rows(max_rows), max_items(max_rows + slots) {}

  DEVICE int32_t& count(int kind) const { return base[kind]; }
  DEVICE int32_t& slices() const { return base[kSlices]; }
  DEVICE int32_t& table(int row) const { return base[kCounts + row]; }
  DEVICE int32_t& spans(int row) const { return base[kCounts + max_rows + row]; }
  DEVICE int32_t& slot(int row) const { return base[kCounts + 2 * max_rows + row]; }
  DEVICE int32_t& stride(int row) const { return base[kCounts + 3 * max_rows + row]; }
  DEVICE Item& item(int kind, int index) const {
    return reinterpret_cast<Item*>(base + kCounts + 4 * max_rows)[kind * max_items + index];
  }

  DEVICE int32_t& done(int row_and_head) const {
    return base[kCounts + 4 * max_rows + 2 * max_items * (sizeof(Item) / 4) + row_and_head];
  }

  static constexpr int kFew = 0, kMany = 1, kSlices = 2, kCounts = 8;
  int32_t* base;
  int max_rows, max_items;
};

// Sums of spans that are merged later: for each slot and head, the maximum, the sum of weights, and the weighted
// values.
struct Partials {
  DEVICE Partials(float* memory, int slots, int heads, int head_dim)
      : maxima(memory), sums(memory + slots * heads), values(memory + 2 * slots * heads), heads(heads), head_dim(head_dim) {}

  DEVICE int index(int slot, int head) const { return slot * heads + head; }
  DEVICE float* channels(int slot, int head) const { return values + static_cast<size_t>(index(slot, head)) * head_dim; }

  float *maxima, *sums, *values;
  int heads, head_dim;
};

DEVICE float greater(float a, float b) { return a > b ? a : b; }

// Merges a sink, which acts as an additional span: its maximum is the sink's score, its sum of weights is 1, its values
// are 0.
struct SinkFactors {
  float keep, gain;

  DEVICE SinkFactors(float before, float score)
      : keep(exp(sub(before, greater(before, score)))), gain(exp(sub(score, greater(before, score)))) {}

  DEVICE float sum(float before) const { return fma(1.0f, gain, mul(before, keep)); }
  static DEVICE float value(float before, float keep, float gain) { return fma(0.0f, gain, mul(before, keep)); }
};

// Returns the first position to which a row attends in causal attention: its own and the `length` - 1 before it; or if
// `chunked`, those from the last multiple of `length` on.
DEVICE int first_in_window(int position, int length, int chunked) {
  if (chunked != 0) return position / length * length;
  return position - length + 1 > 0 ? position - length + 1 : 0;
}

// The range of positions to which a row attends. Rows that attend to later positions have kernels of their own
// (grouped.cu), so code that depends on the range is in a namespace for each kind.
#ifndef LLAMACLUST_GROUPS
#define SEEN_NAMESPACE causal
#define SEEN_ARGUMENTS
#define SEEN_VALUES
inline namespace SEEN_NAMESPACE {

struct Window {
  int length, chunked;

  DEVICE int first_seen(int, int position) const { return first_in_window(position, length, chunked); }
  DEVICE int end_seen(int, int position) const { return position + 1; }
  // Returns minus the distance to the position `ahead` of a row's own (negative for an earlier one).
  DEVICE static int away(int ahead) { return ahead; }
};

}  // namespace SEEN_NAMESPACE
#else
#define SEEN_NAMESPACE grouped
#define SEEN_ARGUMENTS , const int32_t *seen, int32_t sees
#define SEEN_VALUES , seen, sees
inline namespace SEEN_NAMESPACE {

// `seen` has four numbers per row: the first position and the end of its group, the end of its sequence in the batch,
// and 0.
struct Window {
  int length, chunked;
  const int32_t* seen;
  int sees;

  // Values of `sees`. With any other, attention is causal but includes the whole group.
  static constexpr int kGroup = 1, kSequence = 2;

  DEVICE int first_seen(int row, int position) const {
    if (sees == kSequence) return 0;
    return sees == kGroup ? seen[4 * row] : first_in_window(position, length, chunked);
  }
  DEVICE int end_seen(int row, int position) const {
    const int end = seen[4 * row + (sees == kSequence ? 2 : 1)];
    return end > position ? end : position + 1;
  }
  DEVICE static int away(int ahead) { return ahead > 0 ? -ahead : ahead; }
};

}  // namespace SEEN_NAMESPACE
#endif

}  // namespace llamaclust::cuda
