// Memory layout of a plan's buffers (one for all threads, and for few rows one more per thread), and KV memory.
#pragma once

#include <algorithm>
#include <vector>

#include "executor/plan.h"
#include "runtime/memory.h"

namespace llamaclust {

// Up to this number of rows, every thread computes row by row steps for itself.
inline constexpr int kPrivateRows = 4;
// A member of a group computes runs of at least kLeastBandedRows rows in bands, which gather in turn. Bands have at
// least kLeastRowsOfBand rows on average.
inline constexpr int kLeastBandedRows = 64, kLeastRowsOfBand = 32;
// Up to this number of rows, products are limited by memory rather than by arithmetic.
inline constexpr int kFewRows = 8;

// Room for one unit of attention in one thread.
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

// Lines of a microbatch (row * used + rank), ordered by the expert that computes them.
struct ExpertLines {
  int32_t* lines;
  int32_t* rows;  // Row of each line.
  // [experts + 1]: index in `lines` at which an expert's lines begin.
  int32_t* starts;
  int count(size_t expert) const { return starts[expert + 1] - starts[expert]; }
};

class Workspace {
 public:
  // Computes only the layout.
  Workspace(const Plan& plan, int threads);

  // Allocates zeroed memory. Called once, before any access.
  void allocate() { memory_ = Memory(bytes_); }

  // Calls Memory::touch() before the first run.
  void touch() const { memory_.touch(0, bytes_); }

  // Returns the first line of a buffer. `own` returns that of the thread's copy, which holds kPrivateRows rows.
  float* shared(BufferId id) const { return reinterpret_cast<float*>(memory_.data() + shared_[index(id)]); }
  float* own(BufferId id, int thread) const { return reinterpret_cast<float*>(thread_base(thread) + own_[index(id)]); }
  uint8_t* shared_slot(int slot) const { return memory_.data() + shared_slots_[index(slot)]; }
  uint8_t* own_slot(int slot, int thread) const { return thread_base(thread) + own_slots_[index(slot)]; }
  uint8_t* scratch(int thread) const { return thread_base(thread) + scratch_; }
  AttentionScratch attention_scratch(int thread, int head_dim) const;
  ExpertLines expert_lines(int thread) const;

  // Room for sums of spans that different threads compute; its size in floats.
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

// Number of floats of a SpanSums for this number of queries; a multiple of 16.
constexpr size_t span_sums_floats(int queries, int head_dim) {
  const size_t count = static_cast<size_t>(queries);
  return 2 * ((count + 15) / 16 * 16 + 16) + count * static_cast<size_t>(padded_head(head_dim));
}
SpanSums span_sums_at(float* memory, int queries);

// Paged KV memory of a stage. Each layer has, for each block id of its group, a piece of 16 positions per KV head
// (attention_ops.h), or a state.
class KvCache {
 public:
  KvCache() = default;
  KvCache(const std::vector<KvShape>& layers, const Limits& limits) {
    Layout layout;
    for (const KvShape& shape : layers)
      offsets_.push_back(layout.add(kv_block_bytes(shape) * static_cast<size_t>(block_count(shape, limits))));
    memory_ = Memory(layout.bytes());
  }

  // Returns the piece of KV head 0 in block 0. The heads of a block follow each other, then comes the next block.
  uint8_t* layer(int index) const { return memory_.data() + offsets_[index]; }
  size_t bytes() const { return memory_.bytes(); }

  // Calls Memory::touch() for up to `layer_bytes` of each layer, whose first blocks are used first. Called before the
  // first run.
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
