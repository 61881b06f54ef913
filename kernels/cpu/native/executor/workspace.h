// Where the buffers of a plan lie: once for all threads, and for few rows once more for each thread. And its KV memory.
#pragma once

#include <algorithm>
#include <vector>

#include "executor/plan.h"
#include "runtime/memory.h"

namespace llamaclust {

// Up to this many rows, every thread does the row by row steps for itself.
inline constexpr int kPrivateRows = 4;
// A group's member computes so many rows or more in bands, which gather in turn, of so many rows in the mean.
inline constexpr int kLeastBandedRows = 64, kLeastRowsOfBand = 32;
// Up to this many, products wait for weights rather than for multipliers.
inline constexpr int kFewRows = 8;

// Room for a unit of attention in one thread.
struct AttentionScratch {
  float* q;       // [kTileQueries][padded_head]
  float* scores;  // [kScoredQueries][kSpanTokens]
  float* key;     // [head_dim]
  int* firsts;    // [kTileQueries]
  int* ends;      // [kTileQueries]
  int* positions;  // [kTileQueries]
  float* slopes;   // [kTileQueries]
  SpanSums total, next;
};

// Lines of a microbatch (row * used + rank) in the order of the experts that compute them.
struct ExpertLines {
  int32_t* lines;
  int32_t* rows;    // of the lines
  int32_t* starts;  // [experts + 1], where in `lines` an expert's begin
  int count(size_t expert) const { return starts[expert + 1] - starts[expert]; }
};

class Workspace {
 public:
  // Only says where everything will lie.
  Workspace(const Plan& plan, int threads);

  // Takes the memory, all zero. To be called once, before anything is read or written.
  void allocate() { memory_ = Memory(bytes_); }

  // See Memory; before the first run.
  void touch() const { memory_.touch(0, bytes_); }

  // First line of a buffer; `own` returns that thread's copy, which holds kPrivateRows rows.
  float* shared(BufferId id) const { return reinterpret_cast<float*>(memory_.data() + shared_[index(id)]); }
  float* own(BufferId id, int thread) const { return reinterpret_cast<float*>(thread_base(thread) + own_[index(id)]); }
  uint8_t* shared_slot(int slot) const { return memory_.data() + shared_slots_[index(slot)]; }
  uint8_t* own_slot(int slot, int thread) const { return thread_base(thread) + own_slots_[index(slot)]; }
  uint8_t* scratch(int thread) const { return thread_base(thread) + scratch_; }
  AttentionScratch attention_scratch(int thread, int head_dim) const;
  ExpertLines expert_lines(int thread) const;

  // Sums of spans that went to different threads; float32 values that fit.
  float* partials() const { return reinterpret_cast<float*>(memory_.data() + partials_); }
  size_t partial_floats() const { return partial_floats_; }

  size_t bytes() const { return bytes_; }

 private:
  static size_t index(int id) { return static_cast<size_t>(id); }
  uint8_t* thread_base(int thread) const { return memory_.data() + threads_ + index(thread) * thread_bytes_; }

  std::vector<size_t> shared_, own_, shared_slots_, own_slots_;
  size_t scratch_, expert_lines_, max_expert_lines_, partials_, partial_floats_, threads_, thread_bytes_, bytes_;
  Memory memory_;
};

// Floats of a SpanSums of that many queries, a multiple of 16.
constexpr size_t span_sums_floats(int queries, int head_dim) {
  const size_t count = static_cast<size_t>(queries);
  return 2 * ((count + 15) / 16 * 16 + 16) + count * static_cast<size_t>(padded_head(head_dim));
}
SpanSums span_sums_at(float* memory, int queries);

// Paged KV memory of a stage: for each layer, pieces of 16 positions of one KV head (attention_ops.h), or a state, by
// block id of the layer's group.
class KvCache {
 public:
  KvCache() = default;
  KvCache(const std::vector<KvShape>& layers, const Limits& limits) {
    Layout layout;
    for (const KvShape& shape : layers)
      offsets_.push_back(layout.add(kv_block_bytes(shape) * static_cast<size_t>(block_count(shape, limits))));
    memory_ = Memory(layout.bytes());
  }

  // The piece of KV head 0 in block 0; heads lie one after another, then comes the next block.
  uint8_t* layer(int index) const { return memory_.data() + offsets_[index]; }
  size_t bytes() const { return memory_.bytes(); }

  // See Memory; before the first run. Up to `layer_bytes` of each layer: of the blocks that are used first.
  void touch(size_t layer_bytes) const {
    for (size_t i = 0; i < offsets_.size(); i++) {
      const size_t end = i + 1 < offsets_.size() ? offsets_[i + 1] : memory_.bytes();
      memory_.touch(offsets_[i], std::min(end, offsets_[i] + layer_bytes));
    }
  }

 private:
  std::vector<size_t> offsets_;
  Memory memory_;
};

}  // namespace llamaclust
